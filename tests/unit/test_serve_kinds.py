"""Models of every kind behind one service: each answers what its kind can, and says so when it is asked for more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from dermray.errors import ModelError
from dermray.predict import locate
from dermray.release import golden as gate
from dermray.service.engine.engine import Engine
from dermray.service.settings import ServeConfig
from dermray.vectors.encoder import Encoder
from tests import rotation_model
from tests.corpora import write_image_encoder
from tests.serving import LOCAL, data_uri, local_app, photograph, save_tiny_model

PHOTO = photograph()


def save_turned(folder: Path, *, damaged: bool = False, kind: str = "rotation") -> Path:
    torch.manual_seed(0)
    trained = rotation_model.layers(12)
    if damaged:
        trained[2].bias.data[0] = torch.nan
    rotation_model.write(str(folder), kind, trained.state_dict(), {"side": 12}, {})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {
        "tiny": save_tiny_model(root / "tiny"),
        "alone": write_image_encoder(root / "alone", "timm"),
        "turned": save_turned(root / "turned"),
        "judge": save_turned(root / "judge", kind="judge"),
    }


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    with TestClient(local_app(list(folders.values())), base_url=LOCAL) as made:
        yield made


def test_models_say_what_they_answer(client: TestClient) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert {name: (card["kind"], card["answers"]) for name, card in cards.items()} == {
        "tiny": ("clip", ["images", "texts"]),
        "alone": ("image_encoder", ["images"]),
        "turned": ("rotation", ["images", "predictions"]),
        "judge": ("judge", ["predictions"]),
    }
    assert cards["tiny"]["logit_scale"] > 1
    assert cards["alone"]["logit_scale"] is None
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("name", ["alone", "turned"])
def test_images_have_the_vectors_of_their_encoder(client: TestClient, folders: dict[str, Path], name: str) -> None:
    answer = client.post("/v1/embeddings", json={"input": [data_uri(PHOTO)], "model": name})
    assert answer.status_code == 200
    expected = Encoder.load(str(folders[name]), device="cpu").encode_images([PHOTO])[0]
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["turned", "judge"])
def test_a_kind_that_predicts_predicts(client: TestClient, folders: dict[str, Path], name: str) -> None:
    (expected,), _ = Encoder.load(str(folders[name]), device="cpu").predict_readable([PHOTO])
    assert expected is not None
    by_json = client.post("/v1/predict", json={"image": data_uri(PHOTO), "model": name})
    by_form = client.post("/v1/predict", files={"image": PHOTO}, data={"model": name})
    for answer in (by_json, by_form):
        assert answer.status_code == 200
        assert (answer.json()["object"], answer.json()["model"]) == ("prediction", name)
        np.testing.assert_allclose(answer.json()["prediction"]["turns"], expected["turns"], atol=1e-6)
    refused = client.post("/v1/predict", json={"image": data_uri(PHOTO[:700]), "model": name})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "truncated")


@pytest.mark.parametrize(
    ("path", "model", "body", "lacks"),
    [
        ("embeddings", "alone", {"input": ["a mole"]}, "vectors of texts"),
        ("embeddings", "turned", {"input": [data_uri(PHOTO), "a mole"]}, "vectors of texts"),
        ("classify", "alone", {"image": data_uri(PHOTO), "labels": ["a", "b"]}, "vectors of texts"),
        ("concepts", "turned", {"image": data_uri(PHOTO)}, "vectors of texts"),
        ("embeddings", "judge", {"input": [data_uri(PHOTO)]}, "vectors of images"),
        ("predict", "tiny", {"image": data_uri(PHOTO)}, "predictions of its own"),
        ("predict", "alone", {"image": data_uri(PHOTO)}, "predictions of its own"),
    ],
)
def test_what_a_kind_cannot_answer_is_422_and_says_what_it_can(
    client: TestClient, path: str, model: str, body: dict[str, Any], lacks: str
) -> None:
    refused = client.post(f"/v1/{path}", json={**body, "model": model})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (422, "not_answered", "model")
    kind, gives = {
        "tiny": ("clip", "vectors of images, vectors of texts"),
        "alone": ("image_encoder", "vectors of images"),
        "turned": ("rotation", "vectors of images, predictions of its own"),
        "judge": ("judge", "predictions of its own"),
    }[model]
    said = f"model: {model} is of the kind {kind} and gives no {lacks}, which this needs; it gives {gives}"
    assert error["message"] == said


def test_every_kind_is_examined_and_one_that_predicts_nonsense_is_not_served(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for folder in folders.values():
        gate.Golden.make(Encoder.load(str(folder), device="cpu")).save(str(folder))
        engine = Engine(locate(str(folder)), ServeConfig(model=str(folder), device="cpu"))
        checks = engine.examine()
        assert [(one.name, one.passed) for one in checks] == [("smoke", True), ("repeats", True), ("golden", True)]
        assert "not compared" not in checks[-1].detail
        asyncio.run(engine.probe())
    damaged = save_turned(tmp_path / "damaged", damaged=True)
    with pytest.raises(ModelError, match="predictions are not finite: turns"):
        Engine(locate(str(damaged)), ServeConfig(model=str(damaged), device="cpu"))


def test_a_folder_of_an_unknown_kind_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "dermray.json").write_text('{"kind": "segmenter"}')
    with pytest.raises(ModelError, match=f"{tmp_path} holds a model of the kind 'segmenter', which is not known here"):
        locate(str(tmp_path))
