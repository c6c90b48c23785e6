"""Models: by name and by folder, the folder is open_clip's own, and what is refused and how."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from dermray import models, storage
from dermray.errors import ModelError
from dermray.models.layout import CONFIG_NAME
from tests.corpora import MODEL_CFG, write_model
from tests.s3 import BUCKET, faulty_s3

TEXTS = ["a photo of melanoma", "", "Größe 3 mm, " + "sehr lang " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=7)


def photos() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
        for shape in [(40, 60), (32, 32), (100, 20), (20, 90)]
    ]


def embeddings(model: nn.Module, transform: models.factory.ImageTransform, tokenizer: models.factory.Tokenizer):
    with torch.inference_mode():
        pixels = torch.stack([transform(photo) for photo in photos()])
        return model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(TEXTS), normalize=True)


def test_open_clip_loads_what_is_saved_and_embeds_alike(folder: Path) -> None:
    ours = embeddings(*models.create(str(folder)))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs = embeddings(model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape[1] == MODEL_CFG["embed_dim"]
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        assert (mine[0] - mine[1]).abs().max() > 1e-3, "different inputs must differ, or equality proves nothing"


def test_round_trip_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    model, transform, _ = models.create(f"local-dir:{folder}")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    digest = models.save(
        model, str(tmp_path / "again"), model_cfg=models.architecture(str(folder)), provenance={"corpus_digest": "c"}
    )
    again, transform_again, _ = models.create(str(tmp_path / "again"))
    for (name, before), (other, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(before, after)
    assert models.preprocessing(again) == models.preprocessing(model)
    torch.testing.assert_close(transform(photos()[0]), transform_again(photos()[0]), atol=0, rtol=0)
    weights = (tmp_path / "again" / models.WEIGHTS_NAME).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == digest
    assert json.loads((tmp_path / "again" / models.DERMRAY_NAME).read_text()) == {
        "kind": "clip",
        "weights_sha256": digest,
        "corpus_digest": "c",
    }
    assert (folder / models.WEIGHTS_NAME).read_bytes() == weights, "equal weights make equal files"


def test_our_own_architectures_are_known_by_name() -> None:
    torch.manual_seed(0)
    model, transform, tokenizer = models.create("dermray_tiny")
    preprocessing = models.preprocessing(model)
    assert preprocessing.size == 64
    assert len(preprocessing.mean) == len(preprocessing.std) == 3
    assert transform(photos()[0]).shape == (3, 64, 64)
    assert tokenizer(TEXTS).shape == (3, 48)
    assert tokenizer(TEXTS).dtype == torch.int64
    torch.testing.assert_close(models.tokenizer("dermray_tiny")(TEXTS), tokenizer(TEXTS))
    torch.manual_seed(0)
    again, _, _ = models.create("dermray_tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_architecture_of_names_and_folders(folder: Path) -> None:
    assert models.architecture(str(folder)) == models.architecture(f"local-dir:{folder}") == MODEL_CFG
    tiny = models.architecture("dermray_tiny")
    assert tiny["vision_cfg"]["image_size"] == 64
    tiny["vision_cfg"]["image_size"] = 0
    assert models.architecture("dermray_tiny")["vision_cfg"]["image_size"] == 64, "callers get a copy"
    assert models.architecture("ViT-B-16")["embed_dim"] == 512


def test_tokenizer_of_a_folder_is_the_models(folder: Path) -> None:
    _, _, tokenizer = models.create(str(folder))
    torch.testing.assert_close(models.tokenizer(str(folder))(TEXTS), tokenizer(TEXTS))
    assert models.tokenizer(str(folder)) is models.tokenizer(str(folder))


def test_a_folder_in_an_object_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    storage._remote_filesystem.cache_clear()
    try:
        with faulty_s3() as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
            uri = f"s3://{BUCKET}/models/tiny"
            storage.copy_tree(folder, uri)
            for mine, other in zip(
                embeddings(*models.create(uri)), embeddings(*models.create(str(folder))), strict=True
            ):
                assert torch.equal(mine, other)
            assert models.architecture(uri) == MODEL_CFG
    finally:
        storage._remote_filesystem.cache_clear()


@pytest.mark.parametrize("call", [models.create, models.architecture, models.tokenizer])
def test_an_unknown_name_suggests_known_ones(call: object) -> None:
    with pytest.raises(ModelError, match="unknown model 'dermray_tyni'.*did you mean dermray_tiny") as caught:
        call("dermray_tyni")  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_what_is_no_model_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent is not a model folder: it has no open_clip_config\.json"):
        models.create(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"absent is not a model folder"):
        models.architecture(f"local-dir:{tmp_path}/absent")

    empty = shutil.copytree(folder, tmp_path / "empty")
    (empty / models.WEIGHTS_NAME).unlink()
    with pytest.raises(ModelError, match=r"empty has no weights: none of open_clip_model\.safetensors, open_clip_py"):
        models.create(str(empty))

    no_section = shutil.copytree(folder, tmp_path / "no-section")
    (no_section / CONFIG_NAME).write_text('{"preprocess_cfg": {}}')
    with pytest.raises(ModelError, match="has no model_cfg"):
        models.create(str(no_section))


def test_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    """A folder whose weights hold more than tensors is refused; the pickle would run code when opened."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "opened"),)  # type: ignore[return-value]

    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / models.WEIGHTS_NAME).unlink()
    torch.save(Payload(), pickled / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="is damaged, or holds more than tensors and is not opened for that"):
        models.create(str(pickled))
    with pytest.raises(ModelError, match="cannot load the model 'dermray_tiny'"):
        models.create("dermray_tiny", pretrained=str(pickled / "open_clip_pytorch_model.bin"))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "Git LFS pointer .*git lfs pull"),
        (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml" + bytes(40), "an Office document"),
        (b"PK\x05\x06" + bytes(18), "is damaged, or holds more than tensors"),
        (b"weights: see the other folder", "a text and holds no weights: give the file with the weights"),
    ],
)
def test_weights_that_are_something_else_are_named(folder: Path, tmp_path: Path, content: bytes, named: str) -> None:
    """As the model of a job, and as what a training starts from."""
    other = shutil.copytree(folder, tmp_path / "other")
    (other / models.WEIGHTS_NAME).unlink()
    (other / "open_clip_pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=named):
        models.create(str(other))
    with pytest.raises(ModelError, match=named):
        models.create("dermray_tiny", pretrained=str(other / "open_clip_pytorch_model.bin"))


@pytest.mark.parametrize("damage", ["truncated", "other architecture"])
def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if damage == "truncated":
        weights = (copy / models.WEIGHTS_NAME).read_bytes()
        (copy / models.WEIGHTS_NAME).write_bytes(weights[: len(weights) // 2])
    else:
        config = json.loads((copy / CONFIG_NAME).read_text())
        config["model_cfg"]["embed_dim"] = 16
        (copy / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load the model .*copy") as caught:
        models.create(str(copy))
    assert "\n" not in str(caught.value)


def test_training_can_start_from_a_checkpoint_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, _, _ = models.create("dermray_tiny")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(6)
    again, _, _ = models.create("dermray_tiny", pretrained=str(tmp_path / "state.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
