"""From a prepared corpus to search over HTTP: jobs/embed.py, jobs/index.py, and Serve with tokens and two models."""

from __future__ import annotations

import httpx
import pytest

from dermray.client import Client
from dermray.errors import ServiceError, VectorIndexError
from dermray.evaluate.samples import Samples
from dermray.service.settings import ServeArgumentError
from dermray.vectors.encoder import Encoder
from dermray.vectors.index.embeddings import Embeddings
from serve.app import build
from tests.serving import running, save_tiny_model

pytestmark = pytest.mark.ray


@pytest.mark.long
def test_embeddings_index_search_and_two_models_in_one_process(ray_cluster, tmp_path):
    """From a prepared corpus to neighbours over HTTP, with tokens, through encoders inside the HTTP replica."""
    from dermray.commands import embed
    from dermray.commands import index as index_job
    from tests.corpora import write_model, write_prepared_corpus

    model, other = str(write_model(tmp_path / "model")), str(save_tiny_model(tmp_path / "other"))
    corpus, output = str(tmp_path / "corpus"), tmp_path / "embeddings"
    write_prepared_corpus(tmp_path / "corpus", {"train": 24, "val": 12}, broken=[3])
    keys = [f"model={model}", f"corpus={corpus}", f"output={output}", "rows_per_part=10", "tracking.enabled=false"]
    assert embed.main(keys) == 0
    manifest = Embeddings.load(str(output))
    assert (manifest.num_images, manifest.failures, len(manifest.parts)) == (34, {"not_an_image": 2}, 3)
    # As a job leaves it that was killed after its second part: what is there stays, and the result is the same.
    before = manifest.digest
    stamp = (output / "images" / "part-00000.parquet").stat().st_mtime_ns
    for gone in ("embeddings.json", "parts/part-00002.json"):
        (output / gone).unlink()
    assert embed.main(keys) == 0
    assert Embeddings.load(str(output)).digest == before
    assert (output / "images" / "part-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(VectorIndexError, match="replace=true"):
        embed.main([*keys, "thumbnail_side=0"])
    index = str(tmp_path / "index")
    assert index_job.main([f"embeddings={output}", f"output={index}", "tracking.enabled=false"]) == 0

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
