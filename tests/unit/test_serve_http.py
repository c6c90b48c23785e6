"""The HTTP contract over a backend without weights: shapes, refusals, headers, limits, the page. No Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dermray.corpus.ontology import Ontology
from dermray.evaluate import benchmarks
from dermray.predict import concept_names
from dermray.service.fleet.catalogue import Catalogue, Served, Slot
from dermray.service.http.routes import create_app
from dermray.service.refusals import Refusal, unavailable
from dermray.service.settings import LimitsConfig
from dermray.vectors.index import VectorIndex
from dermray.vectors.index.vectors import build
from tests.serving import CLASSES, LOCAL, DummyBackend, bomb_png, data_uri, photograph, save_embeddings

ONTOLOGY = Ontology.from_json(
    {
        "root": ["inflammatory", "proliferations"],
        "inflammatory": ["psoriasis, plaque psoriasis", "acne vulgaris"],
        "proliferations": ["melanoma", "melanocytic nevus"],
        "psoriasis, plaque psoriasis": [],
        "acne vulgaris": [],
        "melanoma": [],
        "melanocytic nevus": [],
    }
)


def client_of(
    backend: DummyBackend | None = None, limits: LimitsConfig | None = None, ontology: Ontology | None = ONTOLOGY
) -> TestClient:
    return TestClient(
        create_app(Catalogue.of(backend or DummyBackend(), ontology), limits or LimitsConfig()), base_url=LOCAL
    )


@pytest.fixture
def client() -> Iterator[TestClient]:
    with client_of() as client:
        yield client


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]


def test_embeddings_answer_in_openai_shape(client):
    answer = client.post("/v1/embeddings", json={"model": "dummy", "input": ["psoriasis", "acne"], "user": "x"})
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "list"
    assert [item["index"] for item in body["data"]] == [0, 1]
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert len(body["data"][0]["embedding"]) == 8
    assert body["usage"] == {"prompt_tokens": 154, "total_tokens": 154}
    assert body["model_info"]["version"] == "3"
    assert body["model_info"]["alias"] == "champion"


def test_base64_is_little_endian_float32_of_the_same_vector(client):
    floats = client.post("/v1/embeddings", json={"input": "acne"}).json()["data"][0]["embedding"]
    coded = client.post("/v1/embeddings", json={"input": "acne", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, np.array(floats, np.float32))


def test_mixed_list_keeps_its_order(client):
    image = data_uri(photograph())
    alone = [
        client.post("/v1/embeddings", json={"input": one}).json()["data"][0]["embedding"] for one in ("a", image, "b")
    ]
    mixed = client.post("/v1/embeddings", json={"input": ["a", image, "b"]}).json()["data"]
    assert [item["embedding"] for item in mixed] == alone


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": []}, 400, "empty_input", "input"),
        ({"input": ["a", "  "]}, 400, "empty_input", "input.1"),
        ({"input": "x" * 9000}, 400, "text_too_long", "input"),
        ({"input": ["a"] * 33}, 413, "too_large", None),
        ({"input": "a", "dimensions": 4}, 400, "unsupported_dimensions", "dimensions"),
        ({"input": "a", "model": "gpt"}, 404, "model_not_found", "model"),
        ({"input": "a", "modality": "image"}, 400, "invalid_data_uri", "input"),
        ({"input": "http://host/a.jpg", "modality": "image"}, 400, "url", "input"),
        ({"input": "data:image/png;base64,@@@"}, 400, "invalid_base64", "input"),
        ({"input": ["a", data_uri(b"hello, no picture")]}, 400, "not_an_image", "input.1"),
        ({"input": data_uri(b"")}, 400, "zero_byte", "input"),
        ({"input": data_uri(photograph()[:900])}, 400, "truncated", "input"),
        ({"input": data_uri(bomb_png())}, 400, "too_many_pixels", "input"),
        ({"model": "dummy"}, 422, "invalid_field", "input"),
        ({"input": "a", "encoding_format": "hex"}, 422, "invalid_field", "encoding_format"),
        ({"input": "a", "inputs": 1}, 422, "invalid_field", "inputs"),
        ({"input": "a", "modality": "audio"}, 422, "invalid_field", "modality"),
        ([1], 422, "invalid_body", None),
    ],
)
def test_embeddings_refusals_name_the_field(client, body, status, code, param):
    answer = client.post("/v1/embeddings", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert client.post("/v1/embeddings", json={"input": "next"}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b"{not json", "headers": {"Content-Type": "application/json"}},
        {"content": b"\xff\xfe{}", "headers": {"Content-Type": "application/json"}},
        {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
        {"content": b'{"input": "\\ud800"}', "headers": {"Content-Type": "application/json"}},
        {"content": b'{"\\udfff": "a", "input": "a"}', "headers": {"Content-Type": "application/json"}},
        {"content": b"input=a", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"--b\r\nnonsense", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
        {"content": b""},
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify"])
def test_malformed_bodies_are_the_senders_fault(client, path, sent):
    answer = client.post(path, **sent)
    assert answer.status_code in (400, 415, 422)
    error_of(answer)


@pytest.mark.parametrize("name", ["dummy", "dummy@champion", "models:/dummy@champion", "dummy/3", ""])
def test_every_spelling_of_the_model_is_accepted(client, name):
    assert client.post("/v1/embeddings", json={"input": "a", "model": name}).status_code == 200


def test_classify_json_ranks_the_given_labels(client):
    body = {"image": data_uri(photograph()), "labels": ["melanoma", "psoriasis", "wart"]}
    answer = client.post("/v1/classify", json=body)
    ranking = answer.json()["ranking"]
    assert answer.status_code == 200
    assert {one["label"] for one in ranking} == set(body["labels"])
    probabilities = [one["probability"] for one in ranking]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    paths = {one["label"]: one["path"] for one in ranking}
    assert paths == {
        "melanoma": ["proliferations", "melanoma"],
        "psoriasis": ["inflammatory", "psoriasis, plaque psoriasis"],
        "wart": None,
    }


def test_classify_without_labels_ranks_the_models_own(client):
    ranking = client.post("/v1/classify", json={"image": data_uri(photograph())}).json()["ranking"]
    assert {one["label"] for one in ranking} == set(CLASSES)


def test_classify_below_an_ontology_node(client):
    body = {"image": data_uri(photograph()), "ontology": "Inflammatory"}
    ranking = client.post("/v1/classify", json=body).json()["ranking"]
    assert {one["label"] for one in ranking} == {"psoriasis", "acne vulgaris"}


@pytest.mark.parametrize(
    "data",
    [
        {"labels": ["melanoma", "nevus, congenital"]},
        {"labels": json.dumps(["melanoma", "nevus, congenital"])},
        {"labels": "melanoma\nnevus, congenital\n"},
    ],
)
@pytest.mark.parametrize("field", ["image", "file"])
def test_classify_multipart_equals_json(client, field, data):
    image = photograph(kind="PNG")
    form = client.post("/v1/classify", files={field: ("lesion.png", image, "image/png")}, data=data)
    body = {"image": data_uri(image), "labels": ["melanoma", "nevus, congenital"]}
    assert form.status_code == 200
    assert form.json()["ranking"] == client.post("/v1/classify", json=body).json()["ranking"]


def test_classify_multipart_labels_by_commas(client):
    form = client.post("/v1/classify", files={"image": photograph()}, data={"labels": "melanoma, psoriasis"})
    assert {one["label"] for one in form.json()["ranking"]} == {"melanoma", "psoriasis"}


def test_templates_reach_the_backend():
    backend = DummyBackend()
    with client_of(backend) as client:
        body = {"image": data_uri(photograph()), "templates": ["a photo of {}"]}
        assert client.post("/v1/classify", json=body).status_code == 200
    assert backend.asked_templates == ("a photo of {}",)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"image": "nonsense"}, 400, "invalid_data_uri"),
        ({"image": data_uri(b"\xff\xd8\xff garbage")}, 400, None),
        ({"image": data_uri(b"")}, 400, "zero_byte"),
        ({"image": data_uri(bomb_png())}, 400, "too_many_pixels"),
        ({"labels": []}, 400, "no_labels"),
        ({"labels": ["a", "a"]}, 400, "duplicate_label"),
        ({"labels": ["Melanoma", "nevus", "melanoma "]}, 400, "duplicate_label"),
        ({"labels": ["nevi", "Naevus"]}, 400, "duplicate_label"),
        ({"labels": ["a", " "]}, 400, "empty_input"),
        ({"labels": [f"c{i}" for i in range(1001)]}, 400, "too_many_labels"),
        ({"labels": [f"{i} " + "c" * 8000 for i in range(251)]}, 400, "too_many_prompts"),
        ({"labels": [f"c{i}" for i in range(1000)], "templates": ["{}" + "a" * 2060]}, 400, "too_many_prompts"),
        ({"labels": ["c" * 200, "c" * 200]}, 400, "duplicate_label"),
        ({"labels": ["a"], "ontology": "psoriasis"}, 400, "conflict"),
        ({"ontology": "wart"}, 400, "unknown_node"),
        ({"ontology": "wart " * 2000}, 400, "text_too_long"),
        ({"templates": ["no place"]}, 400, "invalid_templates"),
        ({"templates": ["{} and {0}"]}, 400, "invalid_templates"),
        ({"templates": []}, 400, "invalid_templates"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"label": ["a"]}, 422, "invalid_field"),
        ({"labels": "a"}, 422, "invalid_field"),
    ],
)
def test_classify_refusals(client, change, status, code):
    answer = client.post("/v1/classify", json={"image": data_uri(photograph())} | change)
    error = error_of(answer)
    assert answer.status_code == status
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"benchmark": "derm1m/nothing"}, "unknown_benchmark", "benchmark"),
        ({"benchmark": "derm1m"}, "unknown_benchmark", "benchmark"),
        ({"benchmark": "derm1m/ham10000", "labels": ["a"]}, "conflict", "benchmark"),
    ],
)
def test_benchmarks_without_a_class_list_are_refused(client, change, code, param):
    error = error_of(client.post("/v1/classify", json={"image": data_uri(photograph())} | change))
    assert (error["code"], error["param"]) == (code, param)


def test_classify_by_a_published_benchmark():
    suite = benchmarks.load("derm1m/ham10000").benchmarks[0]
    with client_of(backend := DummyBackend()) as client:
        body = {"image": data_uri(photograph()), "benchmark": "derm1m/ham10000"}
        ranking = client.post("/v1/classify", json=body).json()["ranking"]
        assert {one["label"] for one in ranking} == set(suite.classes)
        assert backend.asked_templates == (suite.templates or None)
        form = client.post("/v1/classify", files={"image": photograph()}, data={"benchmark": "derm1m/ham10000"})
        assert form.json()["ranking"] == ranking


def test_a_ranking_is_rolled_up_the_tree(client):
    labels = ["melanoma", "psoriasis", "acne vulgaris", "wart"]
    answer = client.post("/v1/classify", json={"image": data_uri(photograph()), "labels": labels}).json()
    probability = {one["label"]: one["probability"] for one in answer["ranking"]}
    nodes = {one["node"]: one for one in answer["hierarchy"]}
    assert set(nodes) == {"inflammatory", "proliferations"}
    expected = probability["psoriasis"] + probability["acne vulgaris"]
    assert nodes["inflammatory"]["probability"] == pytest.approx(expected)
    assert nodes["proliferations"]["probability"] == pytest.approx(probability["melanoma"])
    assert nodes["inflammatory"]["path"] == ["inflammatory"]


def test_concepts_by_json_and_by_form(client):
    everything = client.post("/v1/concepts", json={"image": data_uri(photograph())}).json()["concepts"]
    assert {one["concept"] for one in everything} == set(concept_names())
    body = {"image": data_uri(photograph()), "concepts": ["Plaque", "pigment_network"]}
    answer = client.post("/v1/concepts", json=body)
    assert answer.status_code == 200, answer.text
    assert [one["concept"] for one in answer.json()["concepts"]] == ["plaque", "pigment network"]
    assert answer.headers["X-DermRay-Model-Digest"] == answer.json()["model_info"]["digest"]
    form = client.post("/v1/concepts", files={"image": photograph()}, data={"concepts": "plaque\npigment network"})
    assert form.json()["concepts"] == answer.json()["concepts"]
    for concepts, code in (([], "empty_input"), (["wings"], "unknown_concept"), (["plaque"] * 2, "duplicate_label")):
        error = error_of(client.post("/v1/concepts", json=body | {"concepts": concepts}))
        assert error["code"] == code
    assert error_of(client.post("/v1/concepts", json=body | {"image": data_uri(b"no")}))["code"] == "not_an_image"


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> VectorIndex:
    folder = tmp_path_factory.mktemp("index")
    save_embeddings(folder / "embeddings")
    build(str(folder / "embeddings"), str(folder / "index"))
    return VectorIndex.load(str(folder / "index"))


def test_search_by_text_and_by_image(index):
    app = create_app(Catalogue.of(DummyBackend(), ONTOLOGY), LimitsConfig(), index=index)
    with TestClient(app, base_url=LOCAL) as client:
        assert client.get("/v1/models").json()["data"][0]["can_search"] is True
        for query in ({"query": "psoriasis"}, {"image": data_uri(photograph())}):
            answer = client.post("/v1/search", json=query | {"k": 3})
            assert answer.status_code == 200, answer.text
            hits = answer.json()["data"]
            assert len(hits) == 3
            assert [one["score"] for one in hits] == sorted((one["score"] for one in hits), reverse=True)
            assert hits[0]["thumbnail"].startswith("data:image/jpeg;base64,")
            captions = client.post("/v1/search", json=query | {"target": "text", "k": 1}).json()["data"]
            assert captions[0]["caption"].startswith("caption ")
            assert captions[0]["thumbnail"] is None
        for body in ({"query": "psoriasis"}, {"query": "psoriasis", "k": None, "target": None, "image": None}):
            assert len(client.post("/v1/search", json=body).json()["data"]) == 10
        error = error_of(client.post("/v1/search", json={"query": data_uri(photograph(), "text/plain")}))
        assert (error["code"], error["param"]) == ("invalid_data_uri", "query")
        for body, status in (({}, 400), ({"query": "a", "image": "b"}, 400), ({"query": " "}, 400), ({"k": 0}, 422)):
            assert client.post("/v1/search", json=body).status_code == status


def test_what_is_logged_of_a_failure_is_short(caplog):
    # It passes the redaction, which takes seconds for a megabyte; an error's text may be a whole body.
    failure = RuntimeError("begins" + "a " * 10**6 + "ends")
    with client_of(DummyBackend(failure=failure)) as client:
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 500
    assert all(one in caplog.text for one in ("POST /v1/embeddings failed", "Traceback", "begins", "ends"))
    assert len(caplog.text) < 20_000


def test_search_is_refused_without_an_index_or_with_another_models(index):
    with client_of() as client:
        assert error_of(client.post("/v1/search", json={"query": "a"}))["code"] == "no_index"
        assert client.get("/v1/models").json()["data"][0]["can_search"] is False
    other = DummyBackend()
    other.model = replace(other.model, digest="f" * 64)
    with TestClient(create_app(Catalogue.of(other), LimitsConfig(), index=index), base_url=LOCAL) as client:
        answer = client.post("/v1/search", json={"query": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (409, "index_of_another_model")


def test_several_models_answer_by_name():
    second = DummyBackend()
    second.model = replace(second.model, name="second", version="7", digest="f" * 64)
    catalogue = Catalogue([Slot(Served(DummyBackend(), ONTOLOGY)), Slot(Served(second))])
    with TestClient(create_app(catalogue, LimitsConfig()), base_url=LOCAL) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["dummy", "second"]
        for asked, name in ((None, "dummy"), ("dummy", "dummy"), ("second", "second"), ("second/7", "second")):
            answer = client.post("/v1/embeddings", json={"input": "a", "model": asked})
            assert answer.json()["model_info"]["name"] == name
            assert answer.headers["X-DermRay-Model"] == name
        assert client.post("/v1/embeddings", json={"input": "a", "model": "third"}).status_code == 404


def test_classify_multipart_refusals(client):
    labels = {"labels": "a\nb"}
    bad = client.post("/v1/classify", files={"image": ("a.jpg", b"hello", "image/jpeg")}, data=labels)
    assert (bad.status_code, error_of(bad)["code"]) == (400, "not_an_image")
    none = client.post("/v1/classify", files={"other": b"x"}, data=labels)
    assert (none.status_code, error_of(none)["param"]) == (422, "image")
    two = client.post("/v1/classify", files=[("image", b"x"), ("file", b"y")])
    assert two.status_code == 400
    error_of(two)
    text = client.post("/v1/classify", files={"image": photograph()}, data={"labels": "[1, 2]"})
    assert (text.status_code, error_of(text)["code"]) == (422, "invalid_field")


def test_without_labels_and_without_own_classes_is_refused():
    with client_of(DummyBackend(classes=()), ontology=None) as client:
        image = data_uri(photograph())
        assert error_of(client.post("/v1/classify", json={"image": image}))["code"] == "no_labels"
        answer = client.post("/v1/classify", json={"image": image, "ontology": "psoriasis"})
        assert error_of(answer)["code"] == "no_ontology"


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_413(announced):
    with client_of(limits=LimitsConfig(body_bytes=2048)) as client:
        body = json.dumps({"input": "x" * 4000}).encode()
        sent = body if announced else iter([body[:1500], body[1500:]])
        for path in ("/v1/embeddings", "/v1/classify"):
            answer = client.post(path, content=sent, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert error_of(answer)["code"] == "too_large"
            sent = body if announced else iter([body[:1500], body[1500:]])
        boundary = b"--b\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
        form = iter([boundary, b"x" * 4000, b"\r\n--b--\r\n"])
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        assert client.post("/v1/classify", content=form, headers=headers).status_code == 413


def test_faults_of_the_backend_are_not_the_senders():
    with client_of(DummyBackend(failure=unavailable("the model is restarting"))) as client:
        for answer in (client.post("/v1/embeddings", json={"input": "a"}), client.get("/readyz")):
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "1"
            assert error_of(answer)["type"] == "server_error"
        assert client.get("/healthz").json() == {"status": "ok"}
    with client_of(DummyBackend(failure=Refusal(429, "full", code="queue_full", retry=True))) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"})
        assert error_of(answer)["type"] == "rate_limit_error"
        assert "Retry-After" in answer.headers


def test_an_unexpected_fault_is_500_without_its_text():
    with client_of(DummyBackend(failure=RuntimeError("secret detail"))) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "internal_error"
        assert "secret" not in answer.text
        assert "dermray_request_failures_total" in client.get("/metrics").text


def test_what_was_sent_reaches_neither_the_log_nor_a_disk(monkeypatch, caplog):
    def rolled_over(_):
        raise AssertionError("a body was written to a file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rolled_over)
    caplog.set_level(logging.DEBUG)
    image = photograph(size=(1200, 1000), kind="PNG")
    assert len(image) > 2**20
    secret = "the name of a patient"
    for failure, status in ((None, 200), (RuntimeError("no memory"), 500)):
        with client_of(DummyBackend(failure=failure)) as client:
            form = client.post("/v1/classify", files={"image": image}, data={"labels": f"acne, {secret}"})
            text = client.post("/v1/embeddings", json={"input": [secret, data_uri(image)]})
            assert [form.status_code, text.status_code] == [status, status]
    assert "POST /v1/embeddings failed" in caplog.text
    assert secret not in caplog.text
    assert data_uri(image)[100:160] not in caplog.text


def test_the_deadline_is_504():
    class Slow(DummyBackend):
        async def embed(self, images, texts):
            await asyncio.sleep(5)
            return await super().embed(images, texts)

    with client_of(Slow(), LimitsConfig(request_timeout_s=0.05)) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/models", "/healthz", "/metrics", "/missing"])
def test_every_answer_names_the_model_and_is_locked_down(client, path):
    headers = client.get(path).headers
    assert headers["X-DermRay-Model"] == "dummy"
    assert headers["X-DermRay-Model-Version"] == "3"
    assert headers["X-DermRay-Model-Alias"] == "champion"
    assert headers["X-DermRay-Model-Digest"] == "d" * 64
    assert headers["X-DermRay-Preprocessing-Digest"] == "e" * 64
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_name_outside_ascii_does_not_break_the_headers():
    backend = DummyBackend()
    object.__setattr__(backend.model, "name", "peau-é")
    with client_of(backend) as client:
        assert client.get("/healthz").headers["X-DermRay-Model"] == "peau-%C3%A9"


def test_unknown_paths_and_methods_have_the_error_shape(client):
    assert error_of(client.get("/v1/nothing"))["code"] == "not_found"
    assert error_of(client.get("/assets/..%2f..%2fapp.py"))["code"] == "not_found"
    wrong = client.put("/v1/embeddings")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")


def test_the_page_loads_nothing_from_elsewhere(client):
    seen = []
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["Content-Type"].startswith("text/html")
        assert not re.search(r"https?://|style=|<script>|onclick", page.text)
        seen += re.findall(r'(?:src|href)="(assets/[^"]+)"', page.text)
    assert len(set(seen)) == 4
    for name in set(seen):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org)", answer.text)
        again = client.get(f"/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304


def test_models_lists_what_is_served(client):
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == "dummy"
    assert card["classes"] == list(CLASSES)
    assert card["embedding_dim"] == 8
    assert "models:/dummy@champion" in card["names"]


def test_metrics_count_requests_items_failures_and_stages(client):
    client.post("/v1/embeddings", json={"input": ["a", "b"]})
    client.post("/v1/classify", json={"image": data_uri(photograph())})
    client.post("/v1/embeddings", json={"input": data_uri(b"no")})
    client.get("/anything/at/all")
    text = client.get("/metrics").text
    for line in (
        'dermray_requests_total{route="/v1/embeddings",status="200"} 1.0',
        'dermray_requests_total{route="/v1/embeddings",status="400"} 1.0',
        'dermray_request_failures_total{code="not_an_image",route="/v1/embeddings"} 1.0',
        'dermray_requests_total{route="other",status="404"} 1.0',
        'dermray_items_total{modality="text",model="dummy/3"} 2.0',
        'dermray_items_total{modality="image",model="dummy/3"} 1.0',
        'dermray_batch_size_count{model="dummy/3"} 3.0',
        'dermray_stage_duration_seconds_count{model="dummy/3",stage="forward"} 2.0',
    ):
        assert line in text


def test_server_timing_tells_the_stages(client):
    header = client.post("/v1/embeddings", json={"input": "a"}).headers["Server-Timing"]
    assert [part.split(";")[0] for part in header.split(", ")] == ["decode", "queue", "forward", "classifier", "total"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["input", "image", "labels", "templates", "ontology", "modality", "dimensions", "model"])
IMAGES = st.sampled_from([data_uri(photograph()), data_uri(photograph())[:200], "data:image/png;base64,"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON | st.dictionaries(FIELDS, JSON | IMAGES, max_size=4))
def test_no_json_whatever_makes_the_server_fail(client, body):
    content = json.dumps(body).encode()
    for path in ("/v1/embeddings", "/v1/classify"):
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413, 422), answer.text
        if answer.status_code != 200:
            error_of(answer)


def test_openapi_describes_both_ways_to_classify_and_has_examples(client):
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    assert body["application/json"]["schema"]["examples"]
    schema = document["components"]["schemas"]["EmbeddingsRequest"]
    for example in schema["examples"]:
        assert client.post("/v1/embeddings", json=example).status_code == 200
    for example in body["application/json"]["schema"]["examples"]:
        assert client.post("/v1/classify", json=example).status_code == 200
