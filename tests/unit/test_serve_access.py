"""Who may ask: tokens, their files, what stays open, and that no token means loopback."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from dermray.errors import ConfigError
from serve.auth import Access, is_loopback
from serve.catalogue import Catalogue
from serve.routes import create_app
from serve.settings import AuthConfig, LimitsConfig
from tests.serving import DummyBackend

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
    with TestClient(create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)) as client:
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
