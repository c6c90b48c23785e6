"""The client over the real HTTP application, in process, with a backend without weights."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from dermray.client import FIRST_PAUSE_S, Client
from dermray.errors import ServiceError
from serve.auth import Access, _digest
from serve.catalogue import Catalogue
from serve.errors import unavailable
from serve.routes import create_app
from serve.settings import LimitsConfig
from tests.serving import CLASSES, DummyBackend, photograph

TOKEN = "a-token-of-16-chars"


class Bridge(httpx.BaseTransport):
    """Requests of httpx into the ASGI application; the first few may break."""

    def __init__(self, app, faults=()):
        self.client = TestClient(app)
        self.faults = list(faults)
        self.num_requests = 0

    def handle_request(self, request):
        self.num_requests += 1
        if self.faults:
            raise self.faults.pop(0)
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        answer = self.client.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def client_of(backend, faults=(), **options):
    app = create_app(Catalogue.of(backend), LimitsConfig(), access=Access((_digest(TOKEN),)))
    bridge = Bridge(app, faults)
    waits: list[float] = []
    return Client("http://testserver", token=TOKEN, transport=bridge, sleep=waits.append, **options), bridge, waits


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


def test_what_may_succeed_later_is_asked_again():
    faults = [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("cut")]
    client, bridge, waits = client_of(DummyBackend(), faults)
    assert client.embed_texts(["a"]).shape == (1, 8)
    assert bridge.num_requests == 4
    # Each pause is twice the one before, half more or less.
    pauses = [FIRST_PAUSE_S * 2**attempt for attempt in range(3)]
    assert all(0.5 * pause <= wait <= 1.5 * pause for pause, wait in zip(pauses, waits, strict=True))


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
