"""CAE v2's step equals the published one: latents, predictions, loss, gradients; so are masks' statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dermray.ingest import patch_masks
from dermray.losses import MaskedLatentAlignmentLoss
from dermray.losses.masked_latent import is_masked, token_distances
from dermray.models.cae import CaeV2, reordered

FOLDER = Path(__file__).parent
GRID, NUM_MASKED = 14, 98


def arrays_of(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return arrays_of("cae_v2_pretrain")


@pytest.fixture
def model(arrays: dict[str, Tensor]) -> CaeV2:
    config: dict[str, Any] = json.loads((FOLDER / "cae_v2_pretrain.json").read_text())["config"]
    model = CaeV2(
        config["image_size"],
        config["patch_size"],
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["regressor_depth"],
        teacher_width=512,
    )
    model.load_state_dict({key.removeprefix("state."): value for key, value in arrays.items() if "state." in key})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_loss_and_gradients_equal_the_published_ones(model, arrays, dtype) -> None:
    model.to(dtype)
    mask = arrays["mask"].bool()
    seen: dict[str, Tensor] = {}
    model.encoder.norm.register_forward_hook(lambda *hook: seen.update(encoder_output_cls_then_visible=hook[-1]))
    for number, block in enumerate(model.regresser.regressor_blocks):
        name = f"regressor_block_{number}_output"
        block.register_forward_hook(lambda *hook, name=name: seen.update({name: hook[-1]}))
    prediction = model(arrays["input"].to(dtype), mask)
    for name, value in seen.items():
        torch.testing.assert_close(value.float(), arrays[name], atol=2e-5, rtol=1e-4)
    assert len(seen) == 3
    torch.testing.assert_close(prediction.float(), arrays["pred"], atol=1e-5, rtol=0)

    target = reordered(
        torch.nn.functional.normalize(arrays["teacher_latents_cls_then_patches"].to(dtype), dim=-1), mask
    )
    loss = MaskedLatentAlignmentLoss()(prediction, target, mask)
    torch.testing.assert_close(loss.detach().float(), arrays["loss"], atol=1e-5, rtol=0)
    loss.backward()
    gradients = {name.removeprefix("grad."): value for name, value in arrays.items() if name.startswith("grad.")}
    for name, value in gradients.items():
        given = model.get_parameter(name).grad
        given = torch.zeros_like(value) if given is None else given.float()
        torch.testing.assert_close(given, value, atol=1e-8, rtol=1e-3, msg=name)
    distances = token_distances(prediction, target)
    masked = is_masked(mask, distances)
    for name, part in {
        "cls": distances[:, 0],
        "visible": distances[:, 1:][~masked[:, 1:]],
        "masked": distances[masked],
    }.items():
        torch.testing.assert_close(part.mean().detach().float(), arrays[f"loss_{name}_mean"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def generators() -> list[np.random.Generator]:
    return [np.random.default_rng([7, 0, sample]) for sample in range(6000)]


def test_block_masks_have_the_published_statistics(generators) -> None:
    published = arrays_of("mask_generators")
    masks = patch_masks.block_masks(generators, GRID, NUM_MASKED).reshape(-1, GRID, GRID)
    assert (masks.sum(axis=(1, 2)) == NUM_MASKED).all()
    marginal = masks.mean(axis=0)
    assert np.abs(marginal - published["block_marginal_probability"].numpy()).max() < 0.03
    both = [(masks[:, 1:] & masks[:, :-1]).mean(axis=(1, 2)), (masks[:, :, 1:] & masks[:, :, :-1]).mean(axis=(1, 2))]
    assert abs(np.mean(both) - float(published["block_adjacent_both_masked_fraction"])) < 0.01


def test_random_masks_are_evenly_spread(generators) -> None:
    published = arrays_of("mask_generators")["random_masks_ratio_0p4"]
    count = patch_masks.how_many(GRID * GRID, ratio=0.4, count=None)
    assert count == int(published[0].sum())
    masks = patch_masks.random_masks(generators, GRID, count)
    assert (masks.sum(axis=1) == count).all()
    assert np.abs(masks.mean(axis=0) - count / GRID**2).max() < 0.03
