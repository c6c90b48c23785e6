"""Who may ask: tokens, their files, what stays open, and that no token means loopback; from where, and by what name."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from urllib.parse import unquote

import pytest
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from dermray.errors import ConfigError
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.fleet.rollout import Outcome
from dermray.service.http.auth import Access, Audience, GuardedRoute, is_loopback
from dermray.service.http.origins import Origins
from dermray.service.http.routes import create_app
from dermray.service.settings import AuthConfig, LimitsConfig, ServeArgumentError, parse_arguments
from tests.serving import LOCAL, DummyBackend

FIRST, SECOND, ADMIN = "first-token-of-16", "second-token-of-16", "admin-token-of-16"


@pytest.fixture
def access(tmp_path, monkeypatch) -> Access:
    file = tmp_path / "tokens"
    file.write_text(f"# rotated in May\n{FIRST}\n\n")
    admin = tmp_path / "admin"
    admin.write_text(ADMIN)
    monkeypatch.setenv("DERMRAY_SERVE_TOKENS", f"{SECOND}, ")
    return Access.load(AuthConfig(token_file=str(file), admin_token_file=str(admin)))


@pytest.fixture
def client(access):
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)
    with TestClient(app, base_url=LOCAL) as client:
        yield client


def ask(client: TestClient, token: str | None, path: str = "/v1/embeddings"):
    headers = {"Authorization": token} if token is not None else {}
    return client.post(path, json={"input": "a"}, headers=headers)


@pytest.mark.parametrize("token", [FIRST, SECOND, ADMIN])
def test_every_token_opens_the_service(client, token):
    assert ask(client, f"Bearer {token}").status_code == 200
    assert ask(client, f"bearer {token}").status_code == 200
    assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 200


@pytest.mark.parametrize(
    "token", [None, "", "Bearer ", FIRST, f"Bearer {FIRST}x", f"Basic {FIRST}", "Bearer \u00e9\u00e9"]
)
def test_anything_else_is_401(client, token):
    answer = ask(client, token.encode("latin-1") if token else token)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert FIRST not in answer.text


def test_a_body_is_not_read_before_the_token(client):
    body = iter([b"{", b"x" * 100])
    assert client.post("/v1/embeddings", content=body).status_code == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/assets/app.js"])
def test_probes_and_the_page_need_no_token(client, path):
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/nothing", "/assets/../v1/models"])
def test_the_rest_needs_one(client, path):
    assert client.get(path).status_code == 401


def test_only_an_administrators_token_administers(client):
    path = "/v1/admin/models/dummy/refresh"
    assert ask(client, f"Bearer {FIRST}", path).status_code == 403
    # It follows no alias, so the administrator is told that.
    assert ask(client, f"Bearer {ADMIN}", path).status_code == 404


def test_without_tokens_only_loopback_is_safe(access):
    for host in ("127.0.0.1", "::1", "localhost"):
        Access().require_safe_host(host)
    for host in ("0.0.0.0", "::", "10.0.0.3", "", None, "host.example"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="DERMRAY_SERVE_TOKENS"):
            Access().require_safe_host(host)
        access.require_safe_host(host)


def test_bad_token_files_are_refused_without_showing_a_token(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Access.load(AuthConfig(token_file=str(tmp_path / "none")))
    (tmp_path / "short").write_text("hunter2")
    with pytest.raises(ConfigError, match="shorter than 16") as caught:
        Access.load(AuthConfig(token_file=str(tmp_path / "short")))
    assert "hunter2" not in str(caught.value)


class Changes:
    """Stands where a model's roll-out is, and counts what administrators do."""

    def __init__(self) -> None:
        self.count = 0

    async def look(self, *, again: bool) -> Outcome:
        self.count += 1
        return Outcome("unchanged", "3", None)

    async def roll_back(self) -> Outcome:
        self.count += 1
        return Outcome("rolled_back", "2", "3")


def all_routes(app) -> list[tuple[str, str, Audience]]:
    """(method, path, audience) of every route; one that does not say whom it is for fails here."""
    found = []
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        assert isinstance(route, GuardedRoute), f"{context.path} asks for no token"
        found += [(method, context.path, route.audience) for method in sorted(context.methods)]
    return found


def status_of(app, method: str, raw_path: str, token: str | None, prefix: str, hosts=(b"127.0.0.1:8000",)) -> int:
    """One request as Ray Serve hands it on: a decoded path that holds the prefix, and the prefix as `root_path`."""
    headers = [(b"content-type", b"application/json"), *((b"host", host) for host in hosts)]
    if token is not None:
        headers.append((b"authorization", f"Bearer {token}".encode()))
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "method": method, "query_string": b""}
    scope |= {
        "path": prefix + unquote(raw_path),
        "raw_path": raw_path.encode(),
        "root_path": prefix,
        "headers": headers,
    }
    sent: list[dict] = []
    body = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> dict:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return sent[0]["status"]


def spellings(path: str) -> Iterator[str]:
    """Other ways to write a path that something between here and there may take for the same."""
    yield path + "/"
    yield path + "//"
    yield path + "/."
    yield path + "%2f"
    yield path + "%00"
    yield path + ";x=1"
    yield path + "%20"
    yield "/" + path
    yield path.replace("/", "//")
    yield path.replace("/", "%2f")
    yield path.replace("/", "/./")
    yield path.replace("/", "\\")
    yield "/assets/.." + path
    yield "/assets/%2e%2e" + path
    yield "/healthz/..;" + path
    yield path.upper()
    yield path.replace("a", "%61").replace("v1", "%761")
    yield path.replace("a", "%2561")


@pytest.mark.parametrize("prefix", ["", "/derm", "/v1/admin", "/assets", "/healthz"])
def test_every_route_asks_for_its_token_however_it_is_spelt(access, prefix):
    changes = Changes()
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access, rollouts={"dummy": changes})
    routes = all_routes(app)
    assert {audience for _, _, audience in routes} == set(Audience)
    assert len(routes) >= 14
    expected = {
        Audience.EVERYBODY: {None: 0, FIRST: 0, ADMIN: 0},
        Audience.USERS: {None: 401, FIRST: 0, ADMIN: 0},
        Audience.ADMINISTRATORS: {None: 401, FIRST: 403, ADMIN: 0},
    }
    for method, template, audience in routes:
        path = template.replace("{name}", "app.js" if "assets" in template else "dummy")
        for token, refusal in expected[audience].items():
            status = status_of(app, method, path, token, prefix)
            # The body is empty, so a question that gets that far is refused by its schema, or by its kind.
            assert status == refusal or (refusal == 0 and status in (200, 400, 415, 422)), (method, path, token, status)
    assert changes.count == 2
    tried = 0
    for method, template, audience in routes:
        for path in spellings(template.replace("{name}", "dummy")):
            for token in (None, FIRST):
                status = status_of(app, method, path, token, prefix)
                may = audience is Audience.EVERYBODY or (audience is Audience.USERS and token is not None)
                assert may or not 200 <= status < 300, (method, path, token, status)
                assert status != 500
                tried += 1
    assert tried > 70
    # Nobody but the administrator changed anything.
    assert changes.count == 2


def test_the_prefix_of_the_service_is_in_its_specification(access):
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)
    with TestClient(app, base_url=LOCAL, root_path="/derm") as client:
        assert client.get("/derm/openapi.json").json()["servers"] == [{"url": "/derm"}]
        assert client.get("/derm").status_code == 200
        assert client.get("/derm/").text.startswith("<!doctype html>")


def test_nobody_administers_an_open_service():
    changes = Changes()
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), rollouts={"dummy": changes})
    with TestClient(app, base_url=LOCAL) as client:
        assert ask(client, None).status_code == 200
        for token in (None, "", "Bearer ", f"Bearer {ADMIN}"):
            for what in ("refresh", "rollback"):
                answer = ask(client, token, f"/v1/admin/models/dummy/{what}")
                assert answer.status_code == 403
                assert "DERMRAY_SERVE_ADMIN_TOKENS" in answer.json()["error"]["message"]
    assert changes.count == 0


@pytest.mark.parametrize(
    ("status", "hosts"),
    [
        (200, "127.0.0.1 127.0.0.1:8000 127.4.5.6 localhost:8000 LOCALHOST localhost. [::1]:8000"),
        (200, "derm.example Derm.Example:443"),
        (421, "evil.example 127.0.0.1.evil.example localhost.evil.example derm.example.evil evil.derm.example"),
        (421, "10.0.0.3 0.0.0.0 [::] 2130706433 127.1 0x7f.0.0.1 127.0.0.1@evil localhost,evil.example"),
        (421, f":8000 localhost:x {'a' * 300} localh\u00f6st [::1 ::1"),
    ],
)
def test_a_host_that_is_not_ours_reads_nothing(status, hosts):
    access = Access(origins=Origins(allowed_hosts=("derm.example",)))
    with TestClient(create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)) as client:
        for host, path in itertools.product(
            hosts.split(), ("/", "/healthz", "/v1/models", "/metrics", "/openapi.json")
        ):
            answer = client.get(path, headers={"Host": host.encode("latin-1")})
            assert answer.status_code == status, host
            assert status == 200 or answer.json()["error"]["code"] == "unknown_host"


def test_two_or_no_host_headers_are_refused():
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig())
    with TestClient(app, base_url=LOCAL) as client:
        request = client.build_request("GET", "/healthz", headers=[("Host", "localhost"), ("Host", "evil.example")])
        assert client.send(request).status_code == 421
    assert status_of(app, "GET", "/healthz", None, "", hosts=()) == 421


def test_beyond_loopback_an_address_is_ours_and_a_name_is_not(access):
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access.listening_on("0.0.0.0"))
    with TestClient(app) as client:
        for host, status in (("10.0.0.3:8000", 200), ("[fd00::1]", 200), ("localhost", 200), ("evil.example", 421)):
            assert client.get("/healthz", headers={"Host": host}).status_code == status
    with pytest.raises(ConfigError, match="without tokens"):
        Access().listening_on("0.0.0.0")


PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": LOCAL}, 200),
        ({"Origin": "https://127.0.0.1"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": LOCAL}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Origin": PAGE}, 200),
        ({"Origin": PAGE.upper()}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": f"{PAGE}.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "nonsense"}, 403),
    ],
)
def test_a_page_of_another_site_changes_nothing_and_asks_nothing(access, headers, status):
    """By a form of its own, with whatever a form can send; also where it knew the administrator's token."""
    changes = Changes()
    opened = Access(admin_tokens=access.admin_tokens, tokens=access.tokens, origins=Origins(cors=(PAGE,)))
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=opened, rollouts={"dummy": changes})
    with TestClient(app, base_url=LOCAL) as client:
        for path in ("/v1/embeddings", "/v1/admin/models/dummy/rollback"):
            answer = client.post(path, json={"input": "a"}, headers=headers | {"Authorization": f"Bearer {ADMIN}"})
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["code"] == "cross_site"
    assert changes.count == (status == 200)


def test_scripts_of_listed_pages_alone_may_read_answers():
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=Access(origins=Origins(cors=(PAGE,))))
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with TestClient(app, base_url=LOCAL) as client:
        for origin, allowed in ((PAGE, PAGE), ("https://evil.example", None)):
            for answer in (
                client.options("/v1/embeddings", headers={"Origin": origin, **preflight}),
                client.get("/v1/models", headers={"Origin": origin}),
                client.get("/nothing", headers={"Origin": origin}),
            ):
                assert answer.headers.get("Access-Control-Allow-Origin") == allowed
                assert "Access-Control-Allow-Credentials" not in answer.headers
    with TestClient(create_app(Catalogue.of(DummyBackend()), LimitsConfig()), base_url=LOCAL) as client:
        answer = client.options("/v1/embeddings", headers={"Origin": PAGE, **preflight})
        assert answer.status_code == 405
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("allowed_hosts", "[derm.example, Derm_1.svc]", ["[derm.example:80]", "['http://a']", "['*']", "['']"]),
        (
            "cors",
            "[https://page.example]",
            ["['*']", "[page.example]", "['https://a/b']", "['null']", "['http://u@a']"],
        ),
    ],
)
def test_hosts_and_origins_are_checked_at_the_start(key, good, bad):
    assert len(getattr(parse_arguments({"model": "m", key: good}), key)) >= 1
    for value in bad:
        with pytest.raises(ServeArgumentError, match=key):
            parse_arguments({"model": "m", key: value})
