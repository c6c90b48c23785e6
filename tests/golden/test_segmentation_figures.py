"""PanDerm's segmentation network equals the published one layer by layer, and scores of masks the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate import segmentation
from dermray.models.segmentation import PanDermSegmenter

FILE = Path(__file__).parent / "panderm_segmentation.npz"


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    with np.load(FILE) as arrays:
        found = {name: arrays[name] for name in arrays.files if not name.startswith("state.")}
    # Of equal logits the background's counts.
    return found | {"predicted": found["metric_logits"].argmax(axis=1).astype(bool)}


@pytest.mark.parametrize("figures", ["test", "validation"])
def test_the_released_scores(masks, figures):
    mine = [
        segmentation.published(predicted, truth, validation=figures == "validation")
        for predicted, truth in zip(masks["predicted"], masks["metric_target"], strict=True)
    ]
    for column, name in enumerate(("dice", "jaccard")):
        np.testing.assert_allclose([each[column] for each in mine], masks[f"{name}_{figures}"], atol=1e-12)


def test_what_is_done_to_a_prediction_and_the_scores_that_were_meant(masks):
    for row, (predicted, truth) in enumerate(zip(masks["predicted"], masks["metric_target"], strict=True)):
        spot = segmentation.largest_spot(predicted)
        if predicted.any():
            np.testing.assert_array_equal(spot, masks["metric_postprocessed"][row])
        assert segmentation.dice(spot, truth) == pytest.approx(masks["dice_intended"][row], abs=1e-12)
        assert segmentation.jaccard(spot, truth) == pytest.approx(masks["jaccard_intended"][row], abs=1e-12)


@pytest.fixture(scope="module")
def segmenter() -> PanDermSegmenter:
    config = json.loads(FILE.with_suffix(".json").read_text())["config"]
    model = PanDermSegmenter(
        image_size=config["image_size"],
        patch_size=16,
        width=config["embed_dim"],
        layers=config["depth"],
        heads=config["num_heads"],
        taps=config["out_indices"],
        channels=config["channels"],
        num_classes=config["classes"],
    )
    with np.load(FILE) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("state.")}
    model.load_state_dict({name.removeprefix("state."): value for name, value in state.items()})
    return model.eval()


def test_the_network_layer_by_layer(segmenter, masks):
    images = torch.from_numpy(masks["input"])
    seen: list[torch.Tensor] = []
    hooks = [
        segmenter.backbone.blocks[tap].register_forward_hook(lambda *hook: seen.append(hook[-1]))
        for tap in segmenter.backbone.taps
    ]
    pyramid = segmenter.backbone.pyramid(images)
    for hook in hooks:
        hook.remove()
    expected = {
        **{f"tokens_after_tap_{k}": tokens for k, tokens in enumerate(seen)},
        **{f"pyramid_{k}": each for k, each in enumerate(pyramid)},
        "head_logits": segmenter.decode_head(pyramid),
        "logits": segmenter(images),
    }
    for name, mine in expected.items():
        torch.testing.assert_close(
            mine, torch.from_numpy(masks[name]), atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def test_the_loss_and_its_gradient(segmenter, masks):
    logits = segmenter(torch.from_numpy(masks["input"]))
    logits.retain_grad()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(masks["mask_for_loss"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(masks["loss"]), rel=1e-5)
    torch.testing.assert_close(logits.grad, torch.from_numpy(masks["grad_logits"]), atol=1e-8, rtol=1e-4)
