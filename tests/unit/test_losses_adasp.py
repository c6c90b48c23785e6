"""The adaptive sparse pairwise loss equals the published one written out label by label, on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dermray.errors import ConfigError
from dermray.losses import AdaSpLoss
from tests.process_groups import run_ranks

NUM, WIDTH = 12, 5
LABELS = torch.tensor([3, 3, 8, 1, 8, 3, 1, 1, 8, 8, 5, 5])


def features(spread: float, seed: int = 0) -> Tensor:
    """Rows around one point for each label; with little spread labels are far apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM, WIDTH, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(centres[LABELS] + spread * noise, dim=1)


def naive(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Of each label by itself, in the words of the paper."""
    losses = []
    for label in labels.unique():
        own, others = rows[labels == label], rows[labels != label]
        inside, outside = own @ own.T / temperature, own @ others.T / temperature
        hard = -(-inside).flatten().logsumexp(0)
        easy = (-(-inside).logsumexp(1)).logsumexp(0)
        h, e = hard.item() * temperature, easy.item() * temperature
        weight = 2 * h * e / (h + e) if h > 0 else 0.0
        positive = weight * hard + (1 - weight) * easy
        losses.append((1 + (outside.flatten().logsumexp(0) - positive).exp()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_value_and_gradient_are_those_of_the_plain_form(spread: float) -> None:
    rows, plain = features(spread).requires_grad_(), features(spread).requires_grad_()
    value, wanted = AdaSpLoss(0.2)(rows, LABELS), naive(plain, LABELS, 0.2)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(rows.grad, plain.grad)


def test_labels_that_are_far_apart_cost_less_and_their_order_says_nothing() -> None:
    loss = AdaSpLoss(0.1)
    assert loss(features(0.05), LABELS) < loss(features(0.5), LABELS) < loss(features(3.0), LABELS)
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(features(0.5)[order], LABELS[order] * 7), loss(features(0.5), LABELS))


@pytest.mark.parametrize("labels", [torch.zeros(NUM, dtype=torch.int64), torch.arange(NUM)])
def test_one_label_and_labels_of_one_row_are_finite(labels: Tensor) -> None:
    rows = features(0.5).float().requires_grad_()
    value = AdaSpLoss()(rows, labels)
    value.backward()
    assert value.isfinite()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert bool(rows.grad.any()) == bool(labels.any())


def test_a_temperature_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 0, got 0"):
        AdaSpLoss(0)


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    own = slice(rank * NUM // world_size, (rank + 1) * NUM // world_size)
    rows = features(0.5)[own].requires_grad_()
    value = AdaSpLoss(0.2)(rows, LABELS[own])
    value.backward()
    assert rows.grad is not None
    return {"value": value.detach(), "gradient": rows.grad / world_size}


def test_any_number_of_workers_has_the_loss_and_gradient_of_the_global_batch(tmp_path: Path) -> None:
    answers = run_ranks(on_rank, (1, 2), tmp_path)
    whole = answers[1][0]
    torch.testing.assert_close(whole["value"], naive(features(0.5), LABELS, 0.2))
    for each in answers[2]:
        torch.testing.assert_close(each["value"], whole["value"])
    torch.testing.assert_close(torch.cat([each["gradient"] for each in answers[2]]), whole["gradient"])
