"""A real Serve application over HTTP on loopback: tiny model, real decoding, real batches."""

from __future__ import annotations

import base64
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from dermray.config import TrackingConfig
from dermray.predict.zero_shot import TEMPLATES, build_classifier
from dermray.service.application import find_model
from dermray.service.settings import ServeArgumentError, ServeConfig
from dermray.vectors.encoder import Encoder
from serve.app import build
from tests.serving import CLASSES, bomb_png, data_uri, kill_encoder, photograph, running, save_tiny_model

pytestmark = pytest.mark.ray
MAX_BATCH_SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def url(ray_cluster: None, folder: Path) -> Iterator[str]:
    with running(model=str(folder), device="cpu", max_batch_size=MAX_BATCH_SIZE, batch_wait_ms=20) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def embed(client: httpx.Client, inputs: str | list[str], **fields: object) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"input": inputs, "encoding_format": "base64", **fields})
    assert answer.status_code == 200, answer.text
    return np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer.json()["data"]])


def assert_same_direction(vectors: np.ndarray, expected: np.ndarray) -> None:
    assert vectors.shape == expected.shape
    assert (vectors * expected).sum(axis=1).min() >= 0.9999


def batch_sizes(client: httpx.Client) -> tuple[float, float]:
    """Sum and count of the batch-size histogram, over all gateways."""
    text = client.get("/metrics").text
    values = [re.findall(rf"^dermray_batch_size_{kind}{{.*}} (\S+)$", text, re.M) for kind in ("sum", "count")]
    total, count = (sum(map(float, found)) for found in values)
    return total, count


def test_one_scrape_tells_of_every_gateway_and_the_next_one_too(client):
    """Whichever gateway answers it, so that no counter of Prometheus jumps."""
    scrapes = [client.get("/metrics").text for _ in range(6)]
    asked = [re.findall(r'^dermray_requests_total{gateway="(\w+)".*} (\S+)$', text, re.M) for text in scrapes]
    gateways = [set(re.findall(r'^dermray_requests_in_progress{gateway="(\w+)"}', text, re.M)) for text in scrapes]
    assert all(len(one) == 2 and one == gateways[0] for one in gateways)
    totals = [sum(float(value) for _, value in one) for one in asked]
    assert totals == sorted(totals)


def test_probes_models_and_pages_answer(client, encoder):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == "tiny"
    assert card["classes"] == list(CLASSES)
    assert card["model_info"]["digest"] == encoder.info.model_digest
    assert card["model_info"]["preprocessing_digest"] == encoder.info.preprocessing_digest
    for path in ("/", "/docs", "/openapi.json", "/metrics"):
        assert client.get(path).status_code == 200
    assert client.get("/").headers["X-DermRay-Model"] == "tiny"


def test_vectors_over_http_are_the_encoders(client, encoder):
    photographs = [photograph(seed, kind=kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP"])]
    texts = ["psoriasis on the elbow", "acne"]
    inputs = [texts[0], *map(data_uri, photographs), texts[1]]
    vectors = embed(client, inputs)
    assert_same_direction(vectors[1:4], encoder.encode_images(photographs))
    assert_same_direction(vectors[[0, 4]], encoder.encode_texts(texts))
    floats = client.post("/v1/embeddings", json={"input": texts[0]}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.array(floats, np.float32), vectors[0], atol=1e-6)


def test_a_vector_is_the_same_whatever_batch_it_rode_in(client, encoder):
    photographs = [photograph(seed) for seed in range(20)]
    alone = embed(client, data_uri(photographs[7]))
    together = embed(client, [data_uri(one) for one in photographs])
    assert_same_direction(together[7:8], alone)
    assert_same_direction(together, encoder.encode_images(photographs))


def test_thirty_two_requests_at_once_share_batches(client, url, encoder):
    photographs = [photograph(seed) for seed in range(32)]
    total, count = batch_sizes(client)

    def ask(data: bytes) -> np.ndarray:
        with httpx.Client(base_url=url, timeout=60) as own:
            return embed(own, data_uri(data))[0]

    with ThreadPoolExecutor(32) as pool:
        vectors = np.stack(list(pool.map(ask, photographs)))
    assert_same_direction(vectors, encoder.encode_images(photographs))
    total_after, count_after = batch_sizes(client)
    assert count_after - count == 32
    mean_batch = (total_after - total) / 32
    assert 2 < mean_batch <= MAX_BATCH_SIZE


def test_classify_agrees_with_the_library_by_json_and_by_form(client, encoder):
    image = photograph(3)
    labels = ["melanoma", "psoriasis", "rosacea"]
    weights = np.asarray(build_classifier(encoder, labels, TEMPLATES))
    logits = encoder.logit_scale * (weights @ encoder.encode_images([image])[0])
    expected = dict(zip(labels, np.exp(logits) / np.exp(logits).sum(), strict=True))
    by_json = client.post("/v1/classify", json={"image": data_uri(image), "labels": labels})
    by_form = client.post("/v1/classify", files={"image": ("a.jpg", image)}, data={"labels": labels})
    for answer in (by_json, by_form):
        assert answer.status_code == 200, answer.text
        got = {one["label"]: one["probability"] for one in answer.json()["ranking"]}
        assert got == pytest.approx(expected, abs=1e-4)
    own = client.post("/v1/classify", json={"image": data_uri(image)}).json()["ranking"]
    assert {one["label"] for one in own} == set(CLASSES)


def test_a_repeated_class_list_costs_no_second_classifier(client):
    body = {"image": data_uri(photograph(1)), "labels": [f"condition {i}" for i in range(150)]}

    def classifier_ms() -> float:
        header = client.post("/v1/classify", json=body).headers["Server-Timing"]
        return float(re.search(r"classifier;dur=([\d.]+)", header).group(1))

    first, again = classifier_ms(), min(classifier_ms() for _ in range(3))
    assert again < max(5.0, first / 10)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "zero_byte"),
        (b"hello, this is text", "not_an_image"),
        (photograph()[:900], "truncated"),
        (bomb_png(), "too_many_pixels"),
        (photograph(kind="GIF"), "unsupported_format"),
    ],
    ids=["empty", "text", "truncated", "bomb", "gif"],
)
def test_a_bad_image_is_400_and_the_next_request_works(client, data, code):
    good = data_uri(photograph())
    answers = [
        client.post("/v1/classify", json={"image": data_uri(data), "labels": ["a", "b"]}),
        client.post("/v1/classify", files={"image": ("a.jpg", data)}, data={"labels": "a\nb"}),
        client.post("/v1/embeddings", json={"input": [good, data_uri(data), good]}),
    ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == code
        assert "Traceback" not in answer.text
    assert answers[2].json()["error"]["param"] == "input.1"
    assert embed(client, good).shape == (1, 128)


def test_a_bad_image_does_not_fail_its_neighbours(client, url, encoder):
    photographs = [photograph(seed) for seed in range(12)]

    def ask(data: bytes) -> httpx.Response:
        return httpx.post(f"{url}/v1/embeddings", json={"input": data_uri(data)}, timeout=60)

    mixed = [item for one in photographs for item in (one, b"not an image")]
    with ThreadPoolExecutor(24) as pool:
        statuses = [answer.status_code for answer in pool.map(ask, mixed)]
    assert statuses == [200, 400] * 12


def test_a_text_of_100_000_characters_is_refused_and_a_pixel_has_a_vector(client):
    answer = client.post("/v1/embeddings", json={"input": "x" * 100_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "text_too_long")
    assert embed(client, data_uri(photograph(size=(1, 1), kind="PNG"))).shape == (1, 128)


def test_half_sent_and_slow_bodies_hold_up_nobody(client, url):
    """A body that stops half-way, and one that trickles: others are answered meanwhile, and neither leaves a 500."""
    port = int(url.rpartition(":")[2])
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 30\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as gone, socket.create_connection(("127.0.0.1", port)) as slow:
        gone.sendall(head + b'{"input": ')
        slow.sendall(head + b'{"input": ')
        assert embed(client, "in the meantime").shape == (1, 128)
        gone.close()
        for byte in b'"a text, slowly"   }':
            slow.sendall(bytes([byte]))
        slow.settimeout(60)
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
    assert embed(client, "afterwards").shape == (1, 128)
    assert 'status="500"' not in client.get("/metrics").text


def test_readiness_turns_red_with_the_model_and_green_again(client, url):
    """Kills the only encoder replica; Serve starts another one."""
    kill_encoder()
    statuses = [client.get("/readyz").status_code]
    deadline = time.monotonic() + 60
    while statuses[-1] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
        statuses.append(client.get("/readyz").status_code)
    assert statuses[-1] == 200
    assert 503 in statuses
    assert set(statuses) <= {200, 503}
    assert client.get("/healthz").status_code == 200
    assert embed(client, "again").shape == (1, 128)


def test_a_body_over_twenty_megabytes_is_413(client):
    answer = client.post("/v1/embeddings", json={"input": "x" * (21 * 2**20)})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert embed(client, "next").shape == (1, 128)


def test_the_openai_client_works_unchanged(url, encoder):
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    texts = ["psoriasis", "acne"]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert_same_direction(np.array([one.embedding for one in answer.data], np.float32), encoder.encode_texts(texts))
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="other", input="a")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "model is required"),
        (["model=ViT-B-32", "max_batch=3"], "unknown key 'max_batch', did you mean 'max_batch_size'?"),
        (["model=./nowhere"], "nowhere is not a model folder"),
    ],
    ids=["no-model", "unknown-key", "no-folder"],
)
def test_serve_run_refuses_bad_arguments_in_one_line(arguments, says):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "serve.app:build", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: serve.app: ")
    assert says in last
    assert "Traceback" not in done.stderr


def test_a_registry_alias_becomes_the_models_identity(folder, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = MlflowClient(tracking_uri=uri, registry_uri=uri)
    registry.create_registered_model("dermray")
    registry.create_model_version("dermray", source=str(folder))
    registry.set_registered_model_alias("dermray", "champion", "1")
    tracking = TrackingConfig(uri=uri)
    by_alias = find_model(ServeConfig(model="models:/dermray@champion", tracking=tracking))
    assert (by_alias.uri, by_alias.name, by_alias.version, by_alias.alias) == (str(folder), "dermray", "1", "champion")
    assert by_alias.classes == CLASSES
    by_version = find_model(ServeConfig(model="models:/dermray/1", tracking=tracking))
    assert (by_version.version, by_version.alias) == ("1", None)
    with pytest.raises(ServeArgumentError, match="the registry has no models:/dermray@staging"):
        build({"model": "models:/dermray@staging", "tracking.uri": uri})
