"""A model folder's kind is found, says what its model answers, and is what loads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from dermray import models
from dermray.errors import ModelError
from dermray.models import kinds, layout
from dermray.release import golden as gate
from dermray.tracking.flavour import DermRayModel, signature
from dermray.vectors.encoder import Encoder
from tests import rotation_model
from tests.corpora import RGB, jpeg, write_image_encoder
from tests.serving import save_tiny_model

IMAGES = [jpeg(RGB["red"], width=50, seed=1), jpeg(RGB["brown"], width=90, seed=2)]
SIDE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the kind that `tests.rotation_model` brings."""
    path = tmp_path_factory.mktemp("kinds") / "turned"
    torch.manual_seed(0)
    rotation_model.save(rotation_model.layers(SIDE), str(path), {"code_version": "0"})
    return path


def test_a_kind_of_ones_own_embeds_and_predicts(folder: Path) -> None:
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.answers == rotation_model.KIND.answers
    assert (encoder.info.embedding_dim, encoder.info.image_size, encoder.info.context_length) == (8, SIDE, 0)
    assert encoder.info.model_digest == layout.weights_digest(str(folder))
    assert np.linalg.norm(encoder.encode_images(IMAGES), axis=1) == pytest.approx(1, abs=1e-5)

    model, _, _ = rotation_model.load(folder)
    pixels = np.stack([encoder.preprocess(one) for one in IMAGES])
    predicted = encoder.predict_pixels(pixels)
    assert list(predicted) == ["turns"]
    with torch.inference_mode():
        expected = model.visual(torch.from_numpy(pixels).permute(0, 2, 3, 1).flatten(1)).softmax(1)
    np.testing.assert_allclose(predicted["turns"], expected.numpy(), atol=1e-6)
    with pytest.raises(ModelError, match="turned is an image encoder and takes no texts"):
        encoder.encode_texts(["nevus"])
    assert models.described(str(folder)) == {"kind": "rotation", "config": {"side": SIDE}}


def test_a_kind_that_only_predicts_has_no_vectors_anywhere(folder: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    rotation_model.write(str(tmp_path), "judge", state, {"side": SIDE}, {})
    encoder = Encoder.load(str(tmp_path), device="cpu")
    assert (encoder.answers, encoder.info.embedding_dim) == (frozenset({"predictions"}), 0)
    with pytest.raises(ModelError, match="gives no vectors of images"):
        encoder.encode_images(IMAGES)
    gate.Golden.make(encoder).save(str(tmp_path))
    golden = gate.Golden.load(str(tmp_path))
    assert golden is not None
    assert (len(golden.image_vectors), len(golden.text_vectors), golden.predictions["turns"].shape) == (0, 0, (4, 4))
    assert all(check.passed for check in gate.examine(encoder, golden))
    assert [column.name for column in signature(encoder.answers).outputs] == ["error", "prediction"]
    answer = DermRayModel(str(tmp_path)).predict(pd.DataFrame({"image": [IMAGES[0], b"none", IMAGES[1]]}))
    assert [*answer.columns] == ["error", "prediction"]
    assert answer["error"].tolist() == [None, "not_an_image", None]
    expected, _ = Encoder.load(str(folder), device="cpu").predict_readable(IMAGES)
    for given, one in zip(answer["prediction"].iloc[[0, 2]], expected, strict=True):
        assert one is not None
        np.testing.assert_allclose(given["turns"], one["turns"], atol=1e-6)


def test_golden_answers_are_those_that_the_kind_gives(folder: Path, tmp_path: Path) -> None:
    alone, clip = write_image_encoder(tmp_path / "alone", "timm"), save_tiny_model(tmp_path / "clip")
    # Rows of text vectors, rows of image vectors, names of predictions.
    for path, rows in ((folder, (0, 4, ["turns"])), (alone, (0, 4, [])), (clip, (4, 4, []))):
        encoder = Encoder.load(str(path), device="cpu")
        gate.Golden.make(encoder).save(str(path))
        golden = gate.Golden.load(str(path))
        assert golden is not None
        assert (len(golden.text_vectors), len(golden.image_vectors), [*golden.predictions]) == rows
        checks = gate.examine(encoder, golden)
        assert all(check.passed for check in checks), checks
        moved = dataclasses.replace(golden, image_vectors=np.roll(golden.image_vectors, 1, axis=1))
        assert not gate.examine(encoder, moved)[-1].passed
    golden = gate.Golden.load(str(folder))
    assert golden is not None
    other = dataclasses.replace(golden, predictions={"turns": np.roll(golden.predictions["turns"], 1, axis=1)})
    encoder = Encoder.load(str(folder), device="cpu")
    (*_, check) = gate.examine(encoder, other)
    assert not check.passed
    assert "deviation from the golden predictions" in check.detail
    (*_, check) = gate.examine(encoder, dataclasses.replace(golden, predictions={}))
    assert not check.passed
    assert "answers are of the shapes" in check.detail


def test_a_prediction_that_is_not_finite_is_not_served(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    torch.manual_seed(0)
    trained = rotation_model.layers(SIDE)
    trained[2].bias.data[0] = torch.nan
    rotation_model.save(trained, str(tmp_path / "damaged"), {})
    check = gate.smoke(Encoder.load(str(tmp_path / "damaged"), device="cpu"))
    assert (check.passed, check.detail) == (False, "predictions are not finite: turns")


def test_folders_that_name_no_kind_are_what_they_were(tmp_path: Path) -> None:
    clip = save_tiny_model(tmp_path / "clip")
    facts = json.loads((clip / "dermray.json").read_text())
    assert facts.pop("kind") == "clip"
    (clip / "dermray.json").write_text(json.dumps(facts))
    alone = write_image_encoder(tmp_path / "alone", "timm")
    assert kinds.of(str(clip)) is kinds.OURS["clip"] is kinds.of("ViT-B-32") is kinds.of("hf-hub:some/model")
    assert kinds.of(str(alone)) is kinds.OURS["image_encoder"]
    (alone / "dermray.json").write_text('{"kind": "image_encoder"}')
    assert kinds.of(str(alone)) is kinds.OURS["image_encoder"]
    for folder in (clip, alone):
        encoder = Encoder.load(str(folder), device="cpu")
        assert encoder.answers == kinds.of(str(folder)).answers
        with pytest.raises(ModelError, match=f"{folder.name} gives no predictions of its own"):
            encoder.predict_pixels(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("segmenter", "holds a model of the kind 'segmenter', which is not known here; there are clip, "),
        # A folder chooses no code: an import path that exists is as unknown as one that does not.
        ("tests.rotation_model:KIND", "holds a model of the kind 'tests.rotation_model:KIND', which is not known here"),
        (["clip"], r"dermray\.json: kind must be a text, got \['clip'\]"),
        ("nowhere", "its kind 'nowhere' cannot be imported: No module named 'tests.nowhere'"),
        ("function", "its kind 'function' is a function, and must be a ModelKind"),
    ],
)
def test_an_unknown_kind_is_one_error_that_names_folder_and_kind(tmp_path: Path, named: object, message: str) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "dermray.json").write_text(json.dumps({"kind": named}))
    for ask in (kinds.of, Encoder.load, models.described):
        with pytest.raises(ModelError, match=message) as refused:
            ask(str(folder))
        assert str(folder) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_folder_without_its_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "dermray.json").write_text('{"kind": "rotation"}')
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        Encoder.load(str(tmp_path))
    (tmp_path / "dermray.json").write_text('{"kind": "image_encoder"}')
    with pytest.raises(ModelError, match="is no image encoder of timm, transformers or PanDerm"):
        models.described(str(tmp_path))
    with pytest.raises(ModelError, match="holds a model of the kind image_encoder, and clip is needed here"):
        models.architecture(str(tmp_path))
