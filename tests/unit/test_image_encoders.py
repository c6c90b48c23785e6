"""Image encoders of timm and transformers: their own library's vectors, and nothing of a folder is run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dermray import models
from dermray.errors import ModelError
from dermray.models import image_encoders, layout
from dermray.vectors.encoder import Encoder
from tests.corpora import RGB, jpeg, write_image_encoder

IMAGES = [
    jpeg(RGB["red"], width=50, seed=1),
    jpeg(RGB["brown"], width=300, seed=2),
    jpeg(RGB["pink"], width=170, seed=3),
]


@pytest.fixture(scope="module", params=["timm", "transformers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def of_its_library(folder: Path) -> np.ndarray:
    """Vectors `[N, D]` as the library's own manual makes them."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in IMAGES]
    if folder.name == "timm":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.inference_mode():
            return model(torch.stack([transform(one) for one in pictures])).numpy()
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.inference_mode():
        output = model(**AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt"))
    return output.last_hidden_state[:, 0].numpy()


def test_vectors_are_those_of_the_library(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder.load(str(folder), device="cpu")
    assert not capfd.readouterr().err
    given, reasons = encoder.encode_readable(IMAGES)
    assert set(reasons) == {""}
    np.testing.assert_allclose(given, of_its_library(folder), atol=1e-5)
    units = encoder.encode_images(IMAGES)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1.0, atol=1e-6)
    assert encoder.info.embedding_dim == units.shape[1]
    assert encoder.info.context_length == 0
    assert encoder.info.model_digest == layout.weights_digest(str(folder))
    assert Encoder.load(str(folder), device="cpu").info == encoder.info


def test_texts_are_refused_by_name(folder: Path) -> None:
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.encode_texts([]).shape == (0, encoder.info.embedding_dim)
    with pytest.raises(ModelError, match=f"{folder.name} is an image encoder and takes no texts"):
        encoder.encode_texts(["nevus"])


def test_other_preprocessing_is_another_digest(copied: Path) -> None:
    before = Encoder.load(str(copied), device="cpu").info
    name, key = ("config.json", "mean") if copied.name == "timm" else ("preprocessor_config.json", "image_mean")

    def other(config: dict[str, Any]) -> None:
        (config["pretrained_cfg"] if copied.name == "timm" else config).update({key: [0.1] * 3})

    edit(copied / name, other)
    after = Encoder.load(str(copied), device="cpu").info
    assert after.model_digest == before.model_digest
    assert after.preprocessing_digest != before.preprocessing_digest


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def wants_code(folder: Path) -> None:
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "code.Model"}, model_type="odd"))


def names_pickle(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["model_args"].update(checkpoint_path="evil.pth"))


REFUSED: dict[str, tuple[str | None, Callable[[Path], Any], str]] = {
    "no weights": (None, lambda folder: (folder / "model.safetensors").unlink(), "no "),
    "cut weights": (
        None,
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000]),
        "",
    ),
    "a file to load": ("timm", names_pickle, "model_args of config.json may not hold checkpoint_path"),
    "no architecture": ("timm", lambda at: edit(at / "config.json", lambda c: c.update(architecture="hf-hub:a/b")),
                        "knows no architecture 'hf-hub:a/b'"),
    "arguments of no architecture": (
        "timm", lambda at: edit(at / "config.json", lambda c: c["model_args"].update(nonsense=1)), "nonsense"),
    "other sizes": ("timm", lambda at: edit(at / "config.json", lambda c: c["model_args"].update(img_size=96)),
                    "do not fit"),
    "no processor": ("transformers", lambda folder: (folder / "preprocessor_config.json").unlink(),
                     "no preprocessor_config.json"),
    "a language model": ("transformers", lambda at: edit(at / "config.json", lambda c: c.update(model_type="bert")),
                         ""),
    "more layers": ("transformers", lambda at: edit(at / "config.json", lambda c: c.update(num_hidden_layers=3)),
                    "are missing or of another shape"),
    "wider": ("transformers", lambda at: edit(at / "config.json", lambda c: c.update(intermediate_size=96)), ""),
    "a processor that leaves images as they are": (
        "transformers", lambda at: edit(at / "preprocessor_config.json", lambda c: c.update(do_resize=False)),
        "images would be prepared as float32 [3, 49, 67], and must be as float32 [3, 32, 32]"),
    "images of another size": (
        "transformers", lambda at: edit(at / "preprocessor_config.json", lambda c: c.update(size=48)), "(48*48)"),
    "images of 40 GB": (
        "transformers", lambda at: edit(at / "preprocessor_config.json", lambda c: c.update(size=60000)),
        "images would be brought to 60000 and cut to 60000 pixels a side"),
    "vectors of nothing": (
        "transformers", lambda at: edit(at / "preprocessor_config.json", lambda c: c.update(image_std=[0, 0, 0])),
        "no vector of finite numbers"),
    "a width of more than there is memory": (
        "timm", lambda at: edit(at / "config.json", lambda c: c["model_args"].update(embed_dim=2**22, num_heads=2)),
        "do not fit the architecture"),
    "no square": ("timm", lambda at: edit(at / "config.json", lambda c: c["pretrained_cfg"].update(
        input_size=[3, 160, 224])), "images would be prepared as float32 [3, 160, 224]"),
    "no pooling": ("timm", lambda at: edit(at / "config.json", lambda c: c["model_args"].update(global_pool="")),
                   "no vector of finite numbers comes out for an image, but [1, 101, 64]"),
    "attention of a hub": (
        "transformers", lambda at: edit(at / "config.json", lambda c: c.update(attn_implementation="a/kernel")),
        "config.json names code of a hub, attn_implementation='a/kernel', which is not run"),
    "an adapter": ("transformers", lambda at: (at / "adapter_config.json").write_text("{}"), "has an adapter"),
    "a tower of timm": (
        "transformers", lambda at: edit(at / "config.json", lambda c: c.update(
            model_type="timm_wrapper", model_args={"checkpoint_path": "evil.pth"})), "names a tower of timm"),
    "a tower of a hub inside": (
        "transformers", lambda at: edit(at / "config.json", lambda c: c.update(
            model_type="detr", backbone_config={"model_type": "timm_backbone", "backbone": "hf-hub:a/b"})),
        "names a tower of timm"),
    "code of its own": ("transformers", wants_code, ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_loaded_is_one_line_and_nothing_is_run(fault: str, copied: Path) -> None:
    library, spoil, message = REFUSED[fault]
    if library not in (None, copied.name):
        return
    spoil(copied)
    with pytest.raises(ModelError) as refused:
        image_encoders.load(copied)
    assert message in str(refused.value)
    assert str(copied) in str(refused.value) or "config.json" in str(refused.value) or copied.name == "timm"
    assert "\n" not in str(refused.value)
    assert not (copied / "ran").exists()


def test_a_folder_is_told_from_others(folder: Path, tmp_path: Path) -> None:
    known = models.described(str(folder))
    assert (known["kind"], known["library"]) == ("image_encoder", folder.name)
    assert layout.image_encoder(str(tmp_path)) is None
    assert layout.image_encoder("ViT-B-32") is None
    told = "holds a model of the kind image_encoder, and clip is needed here: it has no open_clip"
    with pytest.raises(ModelError, match=told):
        models.architecture(str(folder))
    with pytest.raises(ModelError, match="is not a model folder: it has no open_clip_config.json"):
        models.architecture(str(tmp_path))


def test_the_digest_is_of_the_weights_that_are_loaded(copied: Path) -> None:
    before = Encoder.load(str(copied), device="cpu").info.model_digest
    (copied / layout.WEIGHTS_NAME).write_bytes(b"of another model, left behind")
    assert Encoder.load(str(copied), device="cpu").info.model_digest == before
    assert layout.weights_digest(str(copied)) == before
