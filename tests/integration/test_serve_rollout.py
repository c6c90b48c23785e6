"""A registry alias that moves under a served model: followed without a lost request, refused when damaged, left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from mlflow import MlflowClient

from dermray.client import Client
from dermray.encoder import Encoder
from dermray.errors import ServiceError, VectorIndexError
from dermray.evaluate.samples import Samples
from dermray.index.embeddings import Embeddings
from dermray.serving.gate import Golden
from serve.app import build
from serve.settings import ServeArgumentError
from tests.serving import data_uri, photograph, running, save_tiny_model

pytestmark = pytest.mark.ray
ALIAS = "models:/dermray@champion"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    """Three versions: two sound ones with golden embeddings, one with NaN weights."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("dermray")
    for number, damaged in ((1, False), (2, False), (3, True)):
        model = str(save_tiny_model(folder / f"v{number}", seed=number, damaged=damaged))
        if not damaged:
            Golden.make(Encoder.load(model, device="cpu")).save(model)
        client.create_model_version("dermray", source=model)
    client.set_registered_model_alias("dermray", "champion", "1")
    return client, uri


@pytest.fixture(scope="module")
def url(ray_cluster: None, registry: tuple[MlflowClient, str]) -> Iterator[str]:
    with running(model=ALIAS, device="cpu", **{"tracking.uri": registry[1], "rollout.poll_s": 0}) as url:
        yield url


class Load:
    """A client that asks without pause in the background, and what it was answered."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[int, str]] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"input": [data_uri(photograph()), "psoriasis"]}
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/embeddings", json=body)
                self.answers.append((answer.status_code, answer.headers["X-DermRay-Model-Version"]))

    def wait_for(self, version: str) -> None:
        seen = len(self.answers)
        while version not in {one for _, one in self.answers[seen:]}:
            time.sleep(0.01)


def change(url: str, what: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/admin/models/dermray/{what}", timeout=60)


def test_the_alias_is_followed_under_load_and_left_again(url, registry):
    client, _ = registry
    with Load(url) as load:
        load.wait_for("1")
        assert change(url, "rollback").status_code == 409
        client.set_registered_model_alias("dermray", "champion", "2")
        followed = change(url, "refresh").json()
        assert (followed["event"], followed["version"], followed["previous"]) == ("followed", "2", "1")
        assert {one["name"]: one["passed"] for one in followed["checks"]} == dict.fromkeys(
            ("smoke", "repeats", "golden"), True
        )
        load.wait_for("2")
        client.set_registered_model_alias("dermray", "champion", "3")
        refused = change(url, "refresh").json()
        assert (refused["event"], refused["version"]) == ("refused", "2")
        assert [one["name"] for one in refused["checks"] if not one["passed"]] == ["loads"]
        load.wait_for("2")
        back = change(url, "rollback").json()
        assert (back["event"], back["version"]) == ("rolled_back", "1")
        load.wait_for("1")
    assert str(client.get_model_version_by_alias("dermray", "champion").version) == "1"
    assert {status for status, _ in load.answers} == {200}
    card = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert card["model_info"]["version"] == "1"
    experiment = client.search_experiments()[0].experiment_id
    runs = client.search_runs([experiment], "tags.`dermray.kind` = 'rollout'", order_by=["start_time ASC"])
    changes = [tuple(run.data.tags[f"rollout.{key}"] for key in ("event", "from", "to")) for run in runs]
    assert changes == [("followed", "1", "2"), ("refused", "2", "3"), ("rolled_back", "2", "1")]


def test_shutdown_finishes_what_was_accepted(url):
    """The last test of this server: it ends it while a request that takes seconds is under way."""
    from ray import serve

    labels = [f"condition number {i} of a long list" for i in range(700)]
    answers: list[httpx.Response] = []
    body = {"image": data_uri(photograph()), "labels": labels}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/classify", json=body, timeout=120)))
    asking.start()
    in_progress = "dermray_requests_in_progress 2.0"
    while in_progress not in httpx.get(f"{url}/metrics", timeout=60).text:
        assert asking.is_alive(), "the request was answered before it could be interrupted"
    serve.delete("dermray-test")
    asking.join(120)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["ranking"]) == 700


def test_embeddings_index_search_and_two_models_in_one_process(ray_cluster, tmp_path, monkeypatch):
    """From a prepared corpus to neighbours over HTTP, with tokens, through encoders inside the HTTP replica."""
    import jobs.embed
    import jobs.index
    from tests.corpora import write_model, write_prepared_corpus

    model, other = str(write_model(tmp_path / "model")), str(save_tiny_model(tmp_path / "other"))
    corpus, output = str(tmp_path / "corpus"), tmp_path / "embeddings"
    write_prepared_corpus(tmp_path / "corpus", {"train": 24, "val": 12}, broken=[3])
    keys = [f"model={model}", f"corpus={corpus}", f"output={output}", "rows_per_part=10", "tracking.enabled=false"]
    assert jobs.embed.main(keys) == 0
    manifest = Embeddings.load(str(output))
    assert (manifest.num_images, manifest.failures, len(manifest.parts)) == (34, {"not_an_image": 2}, 3)
    # As a job leaves it that was killed after its second part: what is there stays, and the result is the same.
    before = manifest.digest
    stamp = (output / "images" / "part-00000.parquet").stat().st_mtime_ns
    for gone in ("embeddings.json", "parts/part-00002.json"):
        (output / gone).unlink()
    assert jobs.embed.main(keys) == 0
    assert Embeddings.load(str(output)).digest == before
    assert (output / "images" / "part-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(VectorIndexError, match="replace=true"):
        jobs.embed.main([*keys, "thumbnail_side=0"])
    index = str(tmp_path / "index")
    assert jobs.index.main([f"embeddings={output}", f"output={index}", "tracking.enabled=false"]) == 0

    encoder = Encoder.load(model, device="cpu")
    samples = Samples.load(corpus, "val")
    image = samples.read_images([5])[5]
    token = "a-token-of-16-characters"
    (tmp_path / "tokens").write_text(token)
    arguments = {"models": f"[{other}]", "index": index, "single_process": "true", "device": "cpu"}
    with running(model=model, **arguments, **{"auth.token_file": str(tmp_path / "tokens")}) as url:
        assert httpx.post(f"{url}/v1/search", json={"query": "a"}).status_code == 401
        with Client(url, token=token) as client:
            assert [(one["id"], one["can_search"]) for one in client.models()] == [("model", True), ("other", False)]
            hit = client.search(image=image, k=1)[0]
            assert hit["sample_id"] == samples.ids[5]
            assert hit["score"] == pytest.approx(1, abs=1e-4)
            assert hit["labels"] == samples.labels[5]
            caption = samples.captions[5]
            assert client.search(caption, target="text", k=1)[0]["caption"] == caption
            near = client.search("psoriasis", k=36)
            vectors = encoder.encode_texts(["psoriasis"]) @ encoder.encode_images([image]).T
            assert {one["sample_id"]: one["score"] for one in near}[samples.ids[5]] == pytest.approx(
                float(vectors[0, 0]), abs=1e-4
            )
            with pytest.raises(ServiceError, match="made by a model of weights"):
                client.search("psoriasis", model="other")
            assert client.embed_texts(["a"], model="other").shape == (1, 128)
    with pytest.raises(ServeArgumentError, match="two models are called 'model'"):
        build({"model": model, "models": f"[{model}]"})
