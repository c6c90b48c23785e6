"""The PanDerm encoder read by itself equals its own repository: class token, and mean of patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dermray.models import image_encoders, panderm_encoder
from dermray.models.panderm_encoder import PanDermConfig

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "panderm_repo_readouts.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def named(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("pooling", "part", "prefix"), [("class", "lp", ""), ("class", "lp", "encoder."), ("mean", "ft", "")]
)
@torch.inference_mode()
def test_features_equal_the_published_ones(arrays, tmp_path, pooling, part, prefix) -> None:
    config = json.loads((FOLDER / "panderm_repo_readouts.json").read_text())["config"]
    state = named(arrays, "trunk.") | named(arrays, f"{part}.")
    described = PanDermConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["embed_dim"],
        layers=config["depth"],
        heads=config["num_heads"],
        pooling=pooling,
    )
    panderm_encoder.write({f"{prefix}{key}": value for key, value in state.items()}, str(tmp_path), described, {})
    encoder, _, tokenizer = image_encoders.load(tmp_path)
    features = encoder.encode_image(arrays["input"])
    torch.testing.assert_close(features, arrays[f"features_{part}"], atol=2e-5, rtol=1e-4)
    assert tokenizer is None
    if part == "ft":
        output = features @ arrays["ft.head.weight"].T + arrays["ft.head.bias"]
        torch.testing.assert_close(output, arrays["output_ft"], atol=2e-5, rtol=1e-4)
