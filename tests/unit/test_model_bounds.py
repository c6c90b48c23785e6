"""Configurations of a few bytes that describe more than their weights hold: refused before that is built."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dermray import models
from dermray.errors import ModelError
from dermray.models import bounds, image_encoders, weights
from tests.corpora import write_image_encoder, write_model

MORE = "the weights do not fit the architecture: the configuration describes many times more than their"
Change = Callable[[dict[str, Any]], object]
# Fields of the configuration → what is said of them; with the old code each took minutes, or all the memory.
OF_TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 50_000}, MORE),
    "more layers": ({"num_hidden_layers": 10**9}, r"has num_hidden_layers=1000000000; at most 100,000 can be"),
    "a huge integer": ({"num_hidden_layers": 10**30}, r"has num_hidden_layers=10{19}; at most 100,000 can be"),
    "below nothing": ({"num_hidden_layers": -(10**12)}, "at most 100,000 can be"),
    "labels": ({"num_labels": 10**8}, r"has num_labels=100000000; at most 100,000 can be"),
    "labels of something inside": ({"backbone_config": {"num_labels": 10**8}}, "at most 100,000 can be"),
    "layers of stages": (
        {"model_type": "swin", "depths": [10**9, 1]},
        r"has depths=1000000000; at most 100,000 can be",
    ),
    "width": ({"hidden_size": 2**20}, MORE),
    "positions": ({"image_size": 2**20}, MORE),
    "layers of another kind": ({"model_type": "dinov2", "num_hidden_layers": 50_000}, MORE),
}
OF_TIMM: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"depth": 50_000}, MORE),
    "width": ({"embed_dim": 2**22, "num_heads": 2}, MORE),
    "positions": ({"img_size": 2**20}, MORE),
}
OF_OPEN_CLIP: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"vision_cfg": {"layers": 50_000}}, MORE),
    "layers of texts": ({"text_cfg": {"layers": 50_000}}, MORE),
    "width": ({"vision_cfg": {"width": 2**20}}, MORE),
    "positions": ({"vision_cfg": {"image_size": 2**18, "patch_size": 2}}, MORE),
    "length of texts": ({"text_cfg": {"context_length": 2**16}}, MORE),
    "a vocabulary": ({"text_cfg": {"vocab_size": 2**24}}, MORE),
    "the joint space": ({"embed_dim": 2**24}, MORE),
    "more than numbers": ({"text_cfg": {"context_length": 10**9}}, "at most 100,000 can be"),
    "labels of a text model": (
        {"text_cfg": {"hf_model_name": "x", "hf_config": {"model_type": "bert", "num_labels": 10**8}}},
        "at most 100,000 can be",
    ),
    "layers of a text model": (
        {"text_cfg": {"hf_model_name": "x", "hf_config": {"model_type": "bert", "num_hidden_layers": 50_000}}},
        MORE,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {library: write_image_encoder(root / library, library) for library in ("timm", "transformers")}
    return {**made, "open_clip": write_model(root / "open_clip")}


def merged(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    for key, value in fields.items():
        inner = config.get(key)
        config[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return config


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CASES = [
    *(("transformers", name, *case) for name, case in OF_TRANSFORMERS.items()),
    *(("timm", name, {"model_args": case[0]}, case[1]) for name, case in OF_TIMM.items()),
    *(("open_clip", name, {"model_cfg": case[0]}, case[1]) for name, case in OF_OPEN_CLIP.items()),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("library", "name", "fields", "said"), CASES, ids=[f"{one[0]}: {one[1]}" for one in CASES])
def test_what_the_weights_cannot_fill_is_refused_before_it_is_built(
    library: str, name: str, fields: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[library], tmp_path / library))
    file = folder / ("open_clip_config.json" if library == "open_clip" else "config.json")
    file.write_text(json.dumps(merged(json.loads(file.read_text()), fields)))
    load = models.create if library == "open_clip" else lambda uri: image_encoders.load(Path(uri))
    before_mb = peak_mb()
    with pytest.raises(ModelError, match=said) as refused:
        load(str(folder))
    assert "\n" not in str(refused.value)
    assert peak_mb() - before_mb < 1_000


def test_a_value_that_stands_for_many_fills_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """A pickled tensor may be as large as its author says: its strides are 0."""
    folder = Path(shutil.copytree(folders["open_clip"], tmp_path / "model"))
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = 2**24
    file.write_text(json.dumps(config))
    state = weights.read(str(folder / "open_clip_model.safetensors"))
    (folder / "open_clip_model.safetensors").unlink()
    name, width = "token_embedding.weight", state["token_embedding.weight"].shape[1]
    torch.save({**state, name: torch.zeros(1, 1).expand(2**24, width)}, folder / "open_clip_pytorch_model.bin")
    before_mb = peak_mb()
    with pytest.raises(ModelError, match=MORE):
        models.create(str(folder))
    assert peak_mb() - before_mb < 500


def test_views_of_one_store_count_as_what_they_are() -> None:
    whole = torch.zeros(10, 4)
    assert bounds.Size.of_state({"a": whole[:4], "b": whole[4:], "c": torch.zeros(3)}) == bounds.Size(3, 43)


def test_what_another_thread_builds_meanwhile_is_its_own_affair() -> None:
    built: list[nn.Module] = []
    with bounds.filled_by(bounds.Size(0, 0)):
        other = threading.Thread(target=lambda: built.append(nn.Sequential(*(nn.Linear(1, 1) for _ in range(1000)))))
        other.start()
        other.join()
        with pytest.raises(ModelError, match=MORE):
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(1000)))
    assert len(built) == 1
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(1000)))


FAILS = "preprocess_cfg of open_clip_config.json fails on a picture: "
TRANSFORMS: dict[str, tuple[dict[str, Any], str]] = {
    "no deviation": ({"std": [0, 0, 0]}, FAILS),
    "hardly a deviation": ({"std": [1e-320] * 3}, FAILS),
    "means of no numbers": ({"mean": [float("nan")] * 3}, "must make finite float32 \\[3, 32, 32\\]"),
    "a thousand channels": ({"mean": [0.5] * 1000}, FAILS),
    "letters": ({"mean": "abc"}, FAILS),
    "no colour": ({"resize_mode": "longest", "fill_color": [1e300, 0, 0]}, FAILS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_that_no_transform_lets_through_are_the_models_fault(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Else each image of a corpus would be counted as damaged, or have a vector of no numbers."""
    changed, said = TRANSFORMS[name]
    folder = Path(shutil.copytree(folders["open_clip"], tmp_path / "model"))
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps(merged(json.loads(file.read_text()), {"preprocess_cfg": changed})))
    with pytest.raises(ModelError, match=said) as refused:
        models.create(str(folder))
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
