"""The PanDerm tower equals the published one, layer by layer, and has the public checkpoints' names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.models.panderm import PanDermVisionTransformer, sincos_table

FOLDER = Path(__file__).parent
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "panderm_vision_tower.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def tower(arrays: dict[str, torch.Tensor]) -> PanDermVisionTransformer:
    config = json.loads((FOLDER / "panderm_vision_tower.json").read_text())["config"]
    tower = PanDermVisionTransformer(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["embed_dim"],
        layers=config["depth"],
        heads=config["num_heads"],
        output_dim=config["num_classes"],
    )
    state = {name.removeprefix("state."): value for name, value in arrays.items() if name.startswith("state.")}
    tower.load_state_dict(state)
    return tower.eval()


@torch.inference_mode()
def test_every_layer_equals_the_published_activations(tower, arrays):
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(tokens_after_pos_embed=args[0])),
        *(
            block.register_forward_hook(lambda *hook, i=i: seen.update({f"tokens_after_block_{i}": hook[-1]}))
            for i, block in enumerate(tower.blocks)
        ),
    ]
    seen["tokens_after_final_norm_first_use"] = tower.forward_tokens(arrays["input"])
    seen["pooled_after_final_norm_second_use"] = tower.forward_features(arrays["input"])
    for hook in hooks:
        hook.remove()
    expected = {name.removeprefix("act."): value for name, value in arrays.items() if name.startswith("act.")}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_equal_the_published_ones(tower, arrays, dtype):
    tower = tower.to(dtype)
    try:
        images = arrays["input"].to(dtype)
        output = tower(images).float()
        torch.testing.assert_close(output, arrays["output"], **TOLERANCE)
        torch.testing.assert_close(torch.nn.functional.normalize(output), arrays["output_l2norm"], **TOLERANCE)
        for name in ("features_before_head", "features_lp"):
            torch.testing.assert_close(tower.forward_features(images).float(), arrays[name], **TOLERANCE)
    finally:
        tower.float()


def test_the_position_table_can_be_computed(arrays):
    torch.testing.assert_close(sincos_table(4, 64), arrays["state.pos_embed"], atol=1e-6, rtol=0)


def test_names_and_shapes_are_the_public_checkpoints():
    expected = json.loads((FOLDER / "panderm_base_state_dict_shapes.json").read_text())["vision_tower_standalone"]
    with torch.device("meta"):
        tower = PanDermVisionTransformer()
    assert {name: list(value.shape) for name, value in tower.state_dict().items()} == expected["tensors"]
    counted = sum(parameter.numel() for parameter in tower.parameters())
    assert counted == expected["parameter_count"]
    assert not tower.pos_embed.requires_grad
