"""ClipLoss equals the published figures on one process and on two, forwards and backwards, by every method."""

from __future__ import annotations

import functools

import pytest
import torch

from dermray.losses import ClipLoss
from tests.contrastive import CLIP_METHODS, value_and_gradients
from tests.golden.conftest import load

close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
FIGURES = ("loss", "grad_image", "grad_text", "grad_logit_scale")


@pytest.mark.parametrize("loss", [ClipLoss(), *(ClipLoss(method, tile_size=5) for method in CLIP_METHODS)])
def test_one_process(loss):
    got = value_and_gradients(loss, load("image_features"), load("text_features"), load("logit_scale"))
    for value, name in zip(got, FIGURES, strict=True):
        close(value, load(f"clip.{name}"))


@pytest.mark.parametrize(("method", "published"), [("local", "clip_local1"), ("dense", "clip_local0")])
def test_two_processes_match_the_reference_with_differentiable_gather(two_ranks, method, published):
    for rank, answers in enumerate(two_ranks):
        for value, name in zip(answers[method], FIGURES, strict=True):
            close(value, load(f"ddp.{published}_gathergrad1.rank{rank}.{name}"))


def test_two_processes_with_tiles_match_the_reference_with_local_loss(two_ranks):
    """The scale's gradient is dealt to the ranks in another way; its mean is the same."""
    published = "ddp.clip_local1_gathergrad1"
    for rank, answers in enumerate(two_ranks):
        for value, name in zip(answers["tiled"][:3], FIGURES, strict=False):
            close(value, load(f"{published}.rank{rank}.{name}"))
    expected = sum(load(f"{published}.rank{rank}.grad_logit_scale") for rank in range(2))
    close(two_ranks[0]["tiled"][3] + two_ranks[1]["tiled"][3], expected)
