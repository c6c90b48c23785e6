"""The client over the real HTTP application, in process, with a backend without weights."""

from __future__ import annotations

from dataclasses import replace

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from dermray.client import FIRST_PAUSE_S, Client
from dermray.errors import ServiceError
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access, _digest
from dermray.service.http.routes import create_app
from dermray.service.refusals import Refusal, unavailable
from dermray.service.settings import LimitsConfig
from tests.serving import CLASSES, LOCAL, DummyBackend, photograph

TOKEN = "a-token-of-16-chars"


class Bridge(httpx.BaseTransport):
    """Requests of httpx into the ASGI application; the first few may break."""

    def __init__(self, app, faults=()):
        self.client = TestClient(app, base_url=LOCAL)
        self.faults = list(faults)
        self.num_requests = 0

    def handle_request(self, request):
        self.num_requests += 1
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, httpx.Response):
                return fault
            raise fault
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        answer = self.client.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def client_of(backend, faults=(), **options):
    app = create_app(Catalogue.of(backend), LimitsConfig(), access=Access((_digest(TOKEN),)))
    bridge = Bridge(app, faults)
    waits: list[float] = []
    return Client(LOCAL, token=TOKEN, transport=bridge, sleep=waits.append, **options), bridge, waits


def test_every_question(tmp_path):
    client, bridge, _ = client_of(DummyBackend())
    file = tmp_path / "a.jpg"
    file.write_bytes(photograph())
    assert client.models()[0]["id"] == "dummy"
    assert client.embed_texts([f"text {i}" for i in range(40)]).shape == (40, 8)
    assert bridge.num_requests == 3
    vectors = client.embed_images([file, photograph(), str(file)])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert {one["label"] for one in client.classify(file)["ranking"]} == set(CLASSES)
    assert client.concepts(file, ["plaque"]) == {"plaque": 0.5}
    with pytest.raises(ServiceError, match="no index is loaded") as caught:
        client.search("psoriasis")
    assert (caught.value.status, caught.value.code) == (400, "no_index")
    assert client.embed_texts([]).shape == (0, 0)
    with pytest.raises(ServiceError, match="gives no predictions of its own, which this needs") as caught:
        client.predict(file)
    assert (caught.value.status, caught.value.code) == (422, "not_answered")
    judge = DummyBackend()
    judge.model = replace(judge.model, kind="judge", answers=frozenset({"predictions"}))
    (predicted,) = client_of(judge)[0].predict(file).values()
    np.testing.assert_allclose(predicted, vectors[0], atol=1e-6)


def test_what_may_succeed_later_is_asked_again():
    faults = [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("cut")]
    client, bridge, waits = client_of(DummyBackend(), faults)
    assert client.embed_texts(["a"]).shape == (1, 8)
    assert bridge.num_requests == 4
    # Each pause is twice the one before, half more or less.
    pauses = [FIRST_PAUSE_S * 2**attempt for attempt in range(3)]
    assert all(0.5 * pause <= wait <= 1.5 * pause for pause, wait in zip(pauses, waits, strict=True))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_bare_5xx_of_a_proxy_whose_worker_died_is_asked_again(status):
    faults = [httpx.Response(status, text=text) for text in ("Internal Server Error", "", "[]", '{"error": "died"}')]
    client, bridge, waits = client_of(DummyBackend(), faults)
    assert client.embed_texts(["a"]).shape == (1, 8)
    assert (bridge.num_requests, len(waits)) == (5, 4)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (RuntimeError("a fault of ours"), "internal_error"),
        (Refusal(504, "late", code="deadline_exceeded"), "deadline_exceeded"),
    ],
)
def test_an_error_that_the_service_itself_tells_is_not_repeated(failure, code):
    client, bridge, waits = client_of(DummyBackend(failure=failure))
    with pytest.raises(ServiceError) as caught:
        client.embed_texts(["a"])
    assert (bridge.num_requests, waits) == (1, [])
    assert caught.value.code == code


def test_a_bare_404_is_the_senders_fault():
    client, bridge, _ = client_of(DummyBackend(), [httpx.Response(404, text="Path not found")])
    with pytest.raises(ServiceError, match="404"):
        client.embed_texts(["a"])
    assert bridge.num_requests == 1


def test_patience_ends_and_the_senders_faults_are_not_repeated():
    client, bridge, waits = client_of(DummyBackend(failure=unavailable("restarting")), patience_s=0.5)
    with pytest.raises(ServiceError, match="restarting"):
        client.embed_texts(["a"])
    # The server asks for a second, more than there is.
    assert (bridge.num_requests, waits) == (1, [])
    client, bridge, _ = client_of(DummyBackend())
    with pytest.raises(ServiceError) as caught:
        client.embed_texts([" "])
    assert (bridge.num_requests, caught.value.param) == (1, "input.0")
