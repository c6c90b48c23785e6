"""SigLipLoss equals the published figures on one process and on two, forwards and backwards."""

from __future__ import annotations

import functools

import pytest
import torch

from dermray.losses import SigLipLoss
from tests.contrastive import value_and_gradients
from tests.golden.conftest import load

close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
FIGURES = ("loss", "grad_image", "grad_text", "grad_logit_scale", "grad_logit_bias")


@pytest.mark.parametrize("tile_size", [None, 1, 5, 12])
def test_one_process(tile_size):
    scalars = load("siglip_logit_scale"), load("siglip_logit_bias")
    got = value_and_gradients(SigLipLoss(tile_size), load("image_features"), load("text_features"), *scalars)
    for value, name in zip(got, FIGURES, strict=True):
        close(value, load(f"siglip.{name}"))


def test_two_processes_give_the_global_loss_and_its_gradient(two_ranks):
    """Losses and scalars in the mean over ranks; features get the gradient of the sum of both ranks' losses."""
    loss, image, text, scale, bias = zip(*(answers["siglip"] for answers in two_ranks), strict=True)
    for got, name in ((loss, "loss"), (scale, "grad_logit_scale"), (bias, "grad_logit_bias")):
        close(sum(got) / 2, load(f"siglip.{name}"))
    for got, name in ((image, "grad_image"), (text, "grad_text")):
        close(torch.cat(got) / 2, load(f"siglip.{name}"))
