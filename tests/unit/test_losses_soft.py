"""Targets graded by diagnosis in CLIP's and SigLIP's losses, against what they are written out pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dermray.errors import ConfigError
from dermray.losses import ClipLoss, Graded, SigLipLoss
from tests.contrastive import CLIP_METHODS, features, value_and_gradients
from tests.make import some_similarity

NUM = 11
DIAGNOSES = torch.tensor([0, 2, -1, 0, 1, -1, 3, 2, 2, 0, 1])
SCALE, BIAS = torch.tensor(6.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def targets(beta: float, temperature: float) -> Tensor:
    """Of each row, by the formula: `[n, n]`."""
    alike = torch.eye(NUM, dtype=torch.float64)
    similarity = some_similarity(4)
    for i, one in enumerate(DIAGNOSES.tolist()):
        for j, other in enumerate(DIAGNOSES.tolist()):
            if i != j and min(one, other) >= 0:
                alike[i, j] = similarity[one, other]
    return (1 - beta) * torch.eye(NUM, dtype=torch.float64) + beta * (alike / temperature).softmax(dim=1)


def plain_clip(image: Tensor, text: Tensor, scale: Tensor, *, wanted: Tensor, kl: bool) -> Tensor:
    logits = scale * image @ text.T
    entropy = torch.xlogy(wanted, wanted).sum() if kl else 0.0
    rows = [-(wanted * each.log_softmax(dim=1)).sum() + entropy for each in (logits, logits.T)]
    return (rows[0] + rows[1]) / (2 * NUM)


def plain_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, wanted: Tensor, kl: bool) -> Tensor:
    chances = (wanted + wanted.T) / 2
    cross = binary_cross_entropy_with_logits(scale * image @ text.T + bias, chances, reduction="sum")
    entropy = (torch.xlogy(chances, chances) + torch.xlogy(1 - chances, 1 - chances)).sum() if kl else 0.0
    return (cross + entropy) / NUM


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
@pytest.mark.parametrize("name", [*CLIP_METHODS, "siglip"])
def test_soft_targets_equal_the_plain_reference(name: Any, divergence: Any, beta: float) -> None:
    image, text = features(4, NUM, 6)
    graded = Graded(DIAGNOSES, some_similarity(4), 0.2, beta, divergence)
    loss = SigLipLoss(3) if name == "siglip" else ClipLoss(name, 3)
    plain = plain_siglip if name == "siglip" else plain_clip
    given = (image, text, SCALE, BIAS) if name == "siglip" else (image, text, SCALE)
    wanted = targets(beta, 0.2)
    expected = value_and_gradients(lambda *each: plain(*each, wanted=wanted, kl=divergence == "kl"), *given)
    got = value_and_gradients(lambda *each: loss(*each, graded=graded), *given)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_without_a_share_targets_are_hard() -> None:
    image, text = features(4, NUM, 6)
    graded = Graded(DIAGNOSES, some_similarity(4), beta=0.0, divergence="kl")
    assert ClipLoss()(image, text, SCALE, graded=graded) == ClipLoss()(image, text, SCALE)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"beta": 1.5}, r"beta in \[0, 1\]"),
        ({"divergence": "js"}, "no divergence 'js'"),
    ],
)
def test_choices_that_mean_nothing_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Graded(DIAGNOSES, some_similarity(4), **choices)


def test_what_does_not_fit_is_refused() -> None:
    image, text = features(4, NUM, 6)
    with pytest.raises(ConfigError, match="not both"):
        ClipLoss()(image, text, SCALE, DIAGNOSES, graded=Graded(DIAGNOSES, some_similarity(4)))
    with pytest.raises(ConfigError, match=r"need labels \[11\], got \[3\]"):
        SigLipLoss()(image, text, SCALE, BIAS, graded=Graded(DIAGNOSES[:3], some_similarity(4)))
