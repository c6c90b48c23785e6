"""Bodies made to take long, and requests made to break something, over a real connection to a real server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from dermray.corpus.ontology import Ontology
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access, _digest
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import VectorIndex
from dermray.vectors.index.vectors import build
from tests.serving import CLASSES, DummyBackend, data_uri, listening, photograph, save_embeddings

SIZE = 20 * 2**20 - 1024
FILE = b'; filename="a.jpg"'
IMAGE_PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
END = b"\r\n--b--\r\n"
# What a refusal, also of a body that nobody should have to read, may take. What was before took minutes.
PATIENCE_S = 10.0
SILENCE_S = 2.0


def whole_app(folder: Path) -> FastAPI:
    """The application with all that a field may be looked up in: a disease tree and an index."""
    save_embeddings(folder / "embeddings")
    build(str(folder / "embeddings"), str(folder / "index"))
    tree = Ontology({"root": ["skin"], "skin": list(CLASSES)})
    index = VectorIndex.load(str(folder / "index"))
    return create_app(Catalogue.of(DummyBackend(), tree), LimitsConfig(), index=index)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(whole_app(tmp_path_factory.mktemp("index"))) as url:
        yield url


def filled(head: bytes, unit: bytes, tail: bytes = b"") -> bytes:
    """As many units between head and tail as a body of 20 MB has room for."""
    return head + unit * ((SIZE - len(head) - len(tail)) // len(unit)) + tail


def part(name: bytes, value: bytes, file: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, file, value)


def listed(key: str, values: list | str) -> bytes:
    return json.dumps({"image": data_uri(photograph()), key: values}).encode()


def long_field(key: str, unit: str, tail: str = "") -> bytes:
    """A question that is right but for one field of 20 MB."""
    return filled(listed(key, "")[:-2], json.dumps(unit)[1:-1].encode(), tail.encode() + b'"}')


JSON_BODIES = {
    **{
        f"many {name}": lambda unit=unit: filled(b'{"input":[', unit + b",", unit + b"]}")
        for name, unit in {
            "numbers": b"1",
            "texts": b'"a"',
            "nulls": b"null",
            "lists": b"[]",
            "objects": b"{}",
        }.items()
    },
    "99,000 numbers": lambda: json.dumps({"input": [1] * 99_000}).encode(),
    "99,000 texts": lambda: json.dumps({"input": ["a"] * 99_000}).encode(),
    "99,000 labels": lambda: listed("labels", [str(number) for number in range(99_000)]),
    "99,000 labels that are numbers": lambda: listed("labels", list(range(99_000))),
    "1,000 long labels": lambda: listed("labels", [f"{number} {'a' * 8180}" for number in range(1000)]),
    # One letter that is eighteen when it is taken apart.
    "1,000 labels of ligatures": lambda: listed("labels", [f"{number} {chr(0xFDFA) * 248}" for number in range(1000)]),
    "a few long labels": lambda: listed("labels", [f"{number} {'a' * 8180}" for number in range(200)]),
    "deep lists": lambda: filled(b'{"input":', b"[", b"}"),
    "deep objects": lambda: filled(b"", b'{"a":', b"1"),
    "deep, but few": lambda: b'{"input":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "a million fields": lambda: b"{" + b",".join(b'"k%07d":1' % number for number in range(1_000_000)) + b"}",
    "90,000 fields": lambda: b"{" + b",".join(b'"k%07d":1' % number for number in range(90_000)) + b"}",
    "a long field": lambda: filled(b'{"', b"k", b'":1}'),
    "a huge integer": lambda: filled(b'{"input":', b"9", b"}"),
    "a huge fraction": lambda: filled(b'{"input":0.', b"9", b"}"),
    "a long text": lambda: filled(b'{"input":"', b"a", b'"}'),
    "a blank text": lambda: filled(b'{"input":"', b" ", b'"}'),
    "escapes": lambda: filled(b'{"input":"', b"\\n", b'"}'),
    "escaped pairs": lambda: filled(b'{"input":"', b"\\ud83d\\ude00", b'"}'),
    "halves of pairs": lambda: filled(b'{"input":"', b"\\ud83d", b'"}'),
    "letters of two bytes": lambda: filled(b'{"input":"', "é".encode(), b'"}'),
    "bytes that are no text": lambda: filled(b'{"input":"', b"\xff", b'"}'),
    "blanks": lambda: filled(b'{"input":', b" ", b"1}"),
    "zeros": lambda: filled(b"", b"\0"),
    "base64 of zeros": lambda: filled(b'{"input":"data:image/png;base64,', b"AAAA", b'"}'),
    "base64 that is none": lambda: filled(b'{"input":"data:image/png;base64,', b"AAA@", b'"}'),
    "base64 alone": lambda: filled(b'{"input":"', b"/9j/", b'"}'),
    "base64 in lines": lambda: filled(b'{"input":"', b"/9j/" * 19 + b"\\n", b'"}'),
    "32 large images": lambda: json.dumps({"input": ["data:image/png;base64," + "A" * 650_000] * 32}).encode(),
    "a long name of a model": lambda: filled(b'{"input":"a","model":"', b"m", b'"}'),
    "a long choice": lambda: filled(b'{"input":"a","modality":"', b"m", b'"}'),
}
FIELDS_ALONE = {
    "a long node": ("/v1/classify", lambda: long_field("ontology", "a")),
    "a long node of words": ("/v1/classify", lambda: long_field("ontology", "a b's, ")),
    "a long benchmark": ("/v1/classify", lambda: long_field("benchmark", "derm1m/")),
    "long templates": ("/v1/classify", lambda: listed("templates", ["{}" + "a" * 600_000] * 32)),
    "long concepts": ("/v1/concepts", lambda: listed("concepts", ["plaque" + " " * 180] * 99_000)),
    "a long concept": ("/v1/concepts", lambda: listed("concepts", ["a" * 19_000_000])),
    "a long image": ("/v1/concepts", lambda: filled(b'{"image":"', b"'", b'a"}')),
    "a long query": ("/v1/search", lambda: filled(b'{"query":"', b"a", b'"}')),
    "a long query in marks": ("/v1/search", lambda: filled(b'{"query":"', b"'", b'a"}')),
    "a long image to search for": ("/v1/search", lambda: filled(b'{"image":"data:image/png;base64,', b"AAAA", b'"}')),
}
FORMS = {
    "a million fields": lambda: filled(b"", part(b"labels", b""), END),
    "a million files": lambda: filled(b"", part(b"image", b"", FILE), END),
    "1,000 fields": lambda: b"".join(part(b"f%d" % number, b"x" * 19_000) for number in range(1000)) + END,
    "a long header": lambda: filled(b"--b\r\nContent-Disposition: form-data; name=", b"a", b"\r\n\r\nx" + END),
    "a million headers": lambda: filled(b"--b\r\n", b"A: b\r\n", b"\r\n\r\n" + END),
    "returns": lambda: filled(IMAGE_PART, b"\r", END),
    "lines": lambda: filled(IMAGE_PART, b"\r\n", END),
    "near boundaries": lambda: filled(IMAGE_PART, b"\r\n--c", END),
    "dashes": lambda: filled(IMAGE_PART, b"\r\n--", END),
    "a long beginning": lambda: filled(b"", b"\r\n", END),
    "a long end": lambda: filled(part(b"image", b"x", FILE) + b"--b--\r\n", b"\r\n"),
    "no end": lambda: filled(IMAGE_PART, b"x"),
    "a long field": lambda: filled(part(b"labels", b"")[:-2], b"x", END),
    "labels by commas": lambda: part(b"image", b"x", FILE) + part(b"labels", b",x" * 500_000) + b"--b--\r\n",
    "labels in JSON": lambda: part(b"image", b"x", FILE) + part(b"labels", b"[" + b"1," * 500_000) + b"--b--\r\n",
    "labels, deep": lambda: part(b"image", b"x", FILE) + part(b"labels", b"[" * 1_000_000) + b"--b--\r\n",
    "zeros": lambda: filled(IMAGE_PART, b"\0", END),
}


class Watch:
    """Asks `/healthz` all the while; `silence_s` is the longest that it waited."""

    def __init__(self, url: str) -> None:
        self.silence_s = 0.0
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.is_set():
                started_s = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                self.silence_s = max(self.silence_s, time.perf_counter() - started_s)
                time.sleep(0.005)


@pytest.mark.parametrize(
    ("bodies", "media_type"),
    [
        ([("/v1/embeddings", *one) for one in JSON_BODIES.items()], "application/json"),
        ([("/v1/classify", *one) for one in JSON_BODIES.items()], "application/json"),
        ([(path, name, make) for name, (path, make) in FIELDS_ALONE.items()], "application/json"),
        ([("/v1/classify", *one) for one in FORMS.items()], "multipart/form-data; boundary=b"),
        ([("/v1/embeddings", *one) for one in FORMS.items()], "multipart/form-data; boundary=b"),
    ],
    ids=["embeddings", "classify", "fields", "forms", "forms for JSON"],
)
def test_no_body_keeps_the_server_from_answering(url, bodies, media_type):
    with httpx.Client(base_url=url, timeout=120) as client, Watch(url) as watch:
        for path, name, make in bodies:
            body = make()
            assert len(body) <= 20 * 2**20
            watch.silence_s, started_s = 0.0, time.perf_counter()
            answer = client.post(path, content=body, headers={"Content-Type": media_type})
            took_s = time.perf_counter() - started_s
            # What comes near a limit and keeps it is answered.
            is_allowed = name in ("1,000 labels of ligatures", "a few long labels")
            assert answer.status_code in (400, 404, 413, 415, 422) or is_allowed, (name, answer.text[:200])
            assert len(answer.content) < 2000 or answer.status_code == 200
            assert took_s < PATIENCE_S, (name, took_s)
            assert watch.silence_s < SILENCE_S, (name, watch.silence_s)


TOKEN, ADMIN_TOKEN = "a-token-of-a-user-here", "a-token-of-an-administrator"
ODD_VALUES = [
    *(None, True, -1, 1e308, 10**400, "", " ", "\0", "\x1b[2J", "\u202e", "{}", "{0.__class__}", "../../etc/passwd"),
    *("http://169.254.169.254/latest", "file:///etc/passwd", "a" * 100_000, [], [[]], [None], [""], {}, {"a": {}}),
    *(["a", "a"], [1.5], "%s%n", "${jndi:ldap://x}", "'; DROP TABLE runs; --"),
]
FIELDS = {
    "/v1/embeddings": ("input", "model", "encoding_format", "dimensions", "modality"),
    "/v1/classify": ("image", "labels", "templates", "benchmark", "ontology"),
    "/v1/concepts": ("concepts",),
    "/v1/search": ("query", "k"),
}
PATHS = [
    *("/../../etc/passwd", "/assets/../../auth.py", "/assets/..%2f..%2fauth.py", "/assets/%2e%2e/%2e%2e/auth.py"),
    *("/assets/..%5c..%5cauth.py", "/assets/%00", "/assets/app.js%00.html", "/assets//etc/passwd", "/assets/"),
    *("//evil.example/", "/\\evil.example", "/%", "/%zz", "/%ff%fe"),
    *("/" + "a" * 8000, "/" + "a/" * 3000, "/?" + "a=b&" * 2000),
    *("/v1/admin/", "/v1/admin/models/%2e%2e/rollback", "/v1/admin/models/%0a/refresh", "/openapi.json/..", "/.env"),
    *("/.git/config", "/docs/../v1/admin/models/dummy/rollback", "http://evil.example/healthz", "*", "healthz"),
]
METHODS = ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "G\0T", "A" * 5000, "", "POST\tx", "PRI"]
# Two ideas of where a request ends; 18 forms.
SMUGGLING = [
    [f"Content-Length: {length}"] for length in ("-1", "+5", "0x5", "5, 5", "5 5", "1e1", "99999999999999999999", "")
] + [
    ["Content-Length: 5", "Content-Length: 6"],
    ["Content-Length: 5", "Transfer-Encoding: chunked"],
    ["Transfer-Encoding: chunked", "Content-Length: 5"],
    ["Transfer-Encoding: chunked, identity"],
    ["Transfer-Encoding: xchunked"],
    ["Transfer-Encoding : chunked"],
    [" Transfer-Encoding: chunked"],
    ["Transfer-Encoding:\tchunked", "Transfer-Encoding: identity"],
    ["Transfer-Encoding: chunked\r\n ,identity"],
    ["X: a\nTransfer-Encoding: chunked"],
]
SMUGGLED = b"0\r\n\r\nPOST /v1/admin/models/dummy/rollback HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
HEADERS = [
    *(
        "Authorization: Bearer",
        "Authorization: Bearer \t",
        f"Authorization: Basic {TOKEN}",
        "Authorization: Bearer " + "a" * 60_000,
    ),
    *(
        f"Authorization: Bearer {TOKEN}, Bearer {ADMIN_TOKEN}",
        "Host: evil.example",
        "X-Forwarded-Host: evil.example",
        "Cookie: a=b",
    ),
    *(
        "Content-Type: text/plain",
        "Content-Type: application/json; charset=utf-7",
        "Content-Type: " + "a" * 9000,
        "Content-Type: ;",
    ),
    *(
        "Content-Encoding: gzip",
        "Expect: 100-continue",
        "Upgrade: websocket",
        "Range: bytes=0-0,-1",
        "If-None-Match: " + '"a",' * 2000,
    ),
    *(
        "X-Request-Timeout-Seconds: nan",
        "X-HTTP-Method-Override: DELETE",
        "X-Original-URL: /v1/admin/models/dummy/rollback",
    ),
    *("Origin: null", "Sec-Fetch-Site: cross-site", "X-\x1b: a", "X: \x1b[2J", "Connection: content-length"),
]
SHORT = b'{"input": "a"}'
IN_FORM = part(b"image", photograph(), FILE)
CHARSETS = ("undefined", "punycode", "idna", "a\0b", "utf-16", "unicode_escape", "hex", "rot13")
ODD_FORMS = [
    *(
        (f"multipart/form-data; charset={charset}; boundary=b", IN_FORM + part(b"labels", b"\\ud800,b"))
        for charset in CHARSETS
    ),
    *(
        ("multipart/form-data; boundary=b", IN_FORM + part(name, value))
        for name in (b"labels", b"templates")
        for value in (
            b"[" + b"9" * 5000 + b"]",
            b"[NaN]",
            b"[" * 5000,
            b'["\\ud800"]',
            b'[{"a":1}]',
            b"\xff\xfe",
            b"[1]",
            b"\0",
        )
    ),
    *((f"multipart/form-data; boundary={boundary}", IN_FORM) for boundary in ("", "b" * 300, "\xe9", "c", '"')),
    ("multipart/form-data", IN_FORM),
    ("multipart/form-data; boundary=b", part(b"image", b"data:image/png;base64,\xff")),
    ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name*=utf-8''%ff\r\n\r\nx\r\n"),
]


def raw(method: str, path: str, headers: list[str], body: bytes, *, length: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", *headers]
    lines += [] if any(one.startswith("Host:") for one in headers) else ["Host: 127.0.0.1"]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def hostile_requests() -> list[bytes]:
    bearer, is_json = f"Authorization: Bearer {TOKEN}", "Content-Type: application/json"
    requests = [raw("GET", path, [bearer], b"") for path in PATHS]
    requests += [raw(method, "/v1/embeddings", [bearer, is_json], SHORT) for method in METHODS]
    requests += [raw("POST", "/v1/embeddings", [is_json, *one], SMUGGLED, length=False) for one in SMUGGLING]
    requests += [raw("POST", "/v1/embeddings", [is_json, one], SHORT) for one in HEADERS]
    for path, fields in FIELDS.items():
        own = {"/v1/embeddings": {"input": "a"}, "/v1/search": {"query": "a"}}.get(
            path, {"image": data_uri(photograph())}
        )
        for field in fields:
            for value in ODD_VALUES:
                body = json.dumps(own | {field: value}).encode()
                requests.append(raw("POST", path, [bearer, is_json], body))
    ends = b"--b--\r\n"
    return requests + [
        raw("POST", "/v1/classify", [bearer, f"Content-Type: {kind}"], body + ends) for kind, body in ODD_FORMS
    ]


def answers_to(url: str, request: bytes) -> bytes:
    """All that the server says until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    said = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(request)
            while some := connection.recv(65536):
                said += some
        except ConnectionError:
            pass
    return said


class Untouched(dict):
    """Roll-outs that nobody here may reach."""

    def get(self, name, default=None):
        raise AssertionError("somebody administers")


def test_hostile_requests_are_refused_and_nobody_administers(caplog):
    access = Access((_digest(TOKEN),), (_digest(ADMIN_TOKEN),))
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(request_timeout_s=1), access=access)
    object.__setattr__(app.state.service, "rollouts", Untouched())
    requests = hostile_requests()
    assert len(SMUGGLING) == 18
    assert len(requests) >= 225
    counts: Counter[str] = Counter()
    with listening(app) as url:
        for number, request in enumerate(requests):
            said = answers_to(url, request)
            shown = (number, request[:200], said[:300])
            # Where a request is no HTTP at all, the server says so or hangs up.
            status = said[9:12].decode() or "closed"
            counts[status] += 1
            assert status in ("closed", "504") or "200" <= status < "500", shown
            assert b"Traceback" not in said, shown
            assert b"root:" not in said, shown
            assert said.count(b"HTTP/1.1 200") <= 1, shown
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert "somebody administers" not in caplog.text

    # They got as far as the application, and few of them make sense all the same.
    assert counts["closed"] + counts["504"] < 10
    assert counts["200"] < 60
