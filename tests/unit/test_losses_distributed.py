"""Several real gloo processes against one, for every loss: values, features, scale and bias, weights through DDP.

Processes are slow to start, so each world size starts once and answers everything that is asked of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dermray.losses import ClipLoss, Graded, MakeLoss, SigLipLoss, cached_backward
from dermray.losses.make.loss import Kinds
from tests.contrastive import CLIP_METHODS, features, some_labels, value_and_gradients
from tests.make import make_inputs, some_similarity
from tests.process_groups import run_ranks

GLOBAL_BATCH = 20
WIDTH = 6
TILE_SIZE = 3
SCALARS = (torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64))
# Losses may be weighted differently on every rank; SigLipLoss asks for equal weights.
UNEQUAL, EQUAL = (1.0, 3.0, -0.5, 2.0), (1.0, 1.0, 1.0, 1.0)


def losses() -> dict[str, tuple[Callable[..., Tensor], int]]:
    """Every loss by name, with the number of scalars it takes."""
    found: dict[str, tuple[Callable[..., Tensor], int]] = {
        method: (ClipLoss(method, TILE_SIZE), 1)  # type: ignore[arg-type]
        for method in CLIP_METHODS
    }
    return found | {"siglip": (SigLipLoss(TILE_SIZE), 2)}


def labels_of(kind: str) -> Tensor | None:
    return {"none": None, "text": some_labels(2, GLOBAL_BATCH, None), "both": some_labels(2, GLOBAL_BATCH, 2)}[kind]


def rows_of(rank: int, world_size: int) -> slice:
    num = GLOBAL_BATCH // world_size
    return slice(rank * num, (rank + 1) * num)


def evaluate_losses(rank: int, world_size: int, weights: tuple[float, ...] = EQUAL) -> dict[str, list[Tensor]]:
    """For every loss and kind of labels: value and gradients of the rank's rows and of the scalars."""
    rows = rows_of(rank, world_size)
    image, text = (each[rows] for each in features(9, GLOBAL_BATCH, WIDTH))
    answers = {}
    for kind in ("none", "text", "both"):
        labels = labels_of(kind)
        for name, (loss, num_scalars) in losses().items():
            bound = functools.partial(loss, labels=None if labels is None else labels[rows])
            answers[f"{name} {kind}"] = value_and_gradients(
                bound, image, text, *SCALARS[:num_scalars], weight=weights[rank]
            )
    diagnoses = some_labels(3, GLOBAL_BATCH, None).clamp(min=-1) % 4
    diagnoses[::5] = -1
    for divergence in ("cross_entropy", "kl"):
        graded = Graded(diagnoses[rows], some_similarity(4), divergence=divergence)
        for name, (loss, num_scalars) in losses().items():
            answers[f"{name} graded {divergence}"] = value_and_gradients(
                functools.partial(loss, graded=graded), image, text, *SCALARS[:num_scalars], weight=weights[rank]
            )
    return answers


def make_total(loss: MakeLoss, valid: Tensor, given: dict[str, Any], *each: Tensor) -> Tensor:
    image, local, text, scale = each
    return loss.of_vectors(image, local, text, valid, scale, **given).total


def evaluate_make(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """For every variant of MAKE's objective: its terms, the loss, and gradients of the rank's rows and of the scale."""
    rows = rows_of(rank, world_size)
    image, local, text, valid, scale = make_inputs(8, GLOBAL_BATCH, 6, WIDTH)
    labels, others = some_labels(3, GLOBAL_BATCH, None).clamp(min=-1) % 4, some_labels(4, GLOBAL_BATCH, 6)
    graded: dict[str, dict[str, Any]] = {
        "hard": {},
        "soft": {"labels": labels[rows], "similarity": some_similarity(4)},
        "apart": {"kinds": Kinds(labels[rows], others[rows])},
    }
    answers = {}
    for name, given in graded.items():
        for negatives in ("all", "valid"):
            loss = MakeLoss(negatives=negatives, tile_size=TILE_SIZE)

            total = functools.partial(make_total, loss, valid[rows], given)
            got = value_and_gradients(total, image[rows], local[rows], text[rows], scale)
            assert loss.terms is not None
            answers[f"{name} {negatives}"] = [torch.stack([loss.terms.mkcl, loss.terms.local]), *got]
    return answers


class Towers(nn.Module):
    """Two small towers, one with dropout, a learnt scale and a bias: what open_clip's models give."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH))
        self.text = nn.Linear(7, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        image, text = (nn.functional.normalize(each, dim=1) for each in (self.image(images), self.text(texts)))
        return image, text, self.logit_scale.exp(), self.logit_bias


def clip_and_bias(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A loss that takes all four."""
    return ClipLoss("tiled", TILE_SIZE)(image, text, scale) + bias.square()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(GLOBAL_BATCH, 10, generator=generator), torch.randn(GLOBAL_BATCH, 7, generator=generator)


def weights_gradients(
    rank: int, world_size: int, loss: Callable[..., Tensor], *, micro_batch_size: int | None = None, dropout: float = 0
) -> dict[str, Any]:
    """Loss and gradient of every weight through DDP, and how often a bucket of gradients was averaged."""
    model = Towers(dropout)
    wrapped: nn.Module = model
    averaged = []
    if world_size > 1:
        wrapped = DistributedDataParallel(model)

        def count_and_average(state, bucket):
            averaged.append(bucket.index())
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, count_and_average)
    rows = rows_of(rank, world_size)
    torch.manual_seed(100 + rank)
    value = cached_backward(
        wrapped,
        [each[rows] for each in inputs()],
        loss,
        micro_batch_size=micro_batch_size,
        no_sync=wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext,
    )
    return {"loss": value, "averaged": len(averaged), "gradients": gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def with_graphs_kept(rank: int, world_size: int, micro_batch_size: int) -> dict[str, Tensor]:
    """One large batch whose parts draw as micro-batches do: gradients averaged over ranks by hand."""
    model = Towers(dropout=0.5)
    torch.manual_seed(100 + rank)
    splits = [each[rows_of(rank, world_size)].split(micro_batch_size) for each in inputs()]
    parts = [model(*part) for part in zip(*splits, strict=True)]
    image, text, scales, biases = zip(*parts, strict=True)
    clip_and_bias(torch.cat(image), torch.cat(text), scales[0], biases[0]).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size
    return gradients(model)


def ask(rank: int, world_size: int) -> dict[str, Any]:
    """The losses of any world; what goes through DDP, whose import takes seconds, of two ranks."""
    answers: dict[str, Any] = {
        "losses": evaluate_losses(rank, world_size),
        "weighted": evaluate_losses(rank, world_size, UNEQUAL),
        "make": evaluate_make(rank, world_size),
    }
    if world_size == 2:
        answers |= {
            "plain": weights_gradients(rank, world_size, clip_and_bias),
            "siglip": weights_gradients(rank, world_size, SigLipLoss(TILE_SIZE)),
            "cached": weights_gradients(rank, world_size, clip_and_bias, micro_batch_size=3),
            "cached siglip": weights_gradients(rank, world_size, SigLipLoss(TILE_SIZE), micro_batch_size=2),
            "cached dropout": weights_gradients(rank, world_size, clip_and_bias, micro_batch_size=4, dropout=0.5),
            "kept dropout": with_graphs_kept(rank, world_size, 4),
        }
    return answers


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return run_ranks(ask, (4, 2), tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def answers(worlds: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the two ranks that went through DDP."""
    return worlds[2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_loss_and_the_gradient_of_the_global_batch(
    worlds: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    """Feature gradients are those of the sum of the ranks' losses; scalars are averaged as DDP does."""
    close = functools.partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
    for name, (loss, image, text, *scalars) in evaluate_losses(0, 1).items():
        ranks = [rank["losses"][name] for rank in worlds[world_size]]
        close(torch.stack([each[0] for each in ranks]).mean(), loss)
        close(torch.cat([each[1] for each in ranks]), world_size * image)
        close(torch.cat([each[2] for each in ranks]), world_size * text)
        for number, expected in enumerate(scalars, start=3):
            close(torch.stack([each[number] for each in ranks]).mean(), expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_terms_of_the_global_batch_and_its_share_of_their_gradient(
    worlds: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    """Of MAKE's objective; the bits of the terms are the same everywhere."""
    close = functools.partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
    for name, (terms, loss, *expected, scale) in evaluate_make(0, 1).items():
        ranks = [rank["make"][name] for rank in worlds[world_size]]
        for rank in ranks:
            assert torch.equal(rank[0], ranks[0][0])
            assert torch.equal(rank[1], ranks[0][1])
        close(ranks[0][0], terms)
        close(ranks[0][1], loss)
        for number, one in enumerate(expected, start=2):
            close(torch.cat([each[number] for each in ranks]), world_size * one)
        close(torch.stack([each[5] for each in ranks]).mean(), scale)


@pytest.mark.parametrize("world_size", [2, 4])
def test_tiles_agree_with_rows_on_every_rank_also_where_ranks_weigh_differently(
    worlds: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    close = functools.partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
    ranks = [rank["weighted"] for rank in worlds[world_size]]
    for kind in ("none", "text", "both", "graded kl"):
        pairs = [(rank[f"local {kind}"], rank[f"tiled {kind}"]) for rank in ranks]
        for local, tiled in pairs:
            for one, other in zip(local[:3], tiled[:3], strict=True):
                close(one, other)
        close(*(torch.stack([pair[side][3] for pair in pairs]).mean() for side in (0, 1)))


@pytest.mark.parametrize("name", ["plain", "siglip", "cached", "cached siglip"])
def test_weights_get_the_gradient_of_one_large_batch_on_one_process(answers: list[dict[str, Any]], name: str) -> None:
    loss = SigLipLoss() if "siglip" in name else clip_and_bias
    expected = weights_gradients(0, 1, loss)
    assert len(expected["gradients"]) == 8
    torch.testing.assert_close(
        torch.stack([rank[name]["loss"] for rank in answers]).mean(), expected["loss"], atol=1e-6, rtol=1e-6
    )
    for key, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 1e-3, "a vanishing gradient would prove nothing"
        for rank in answers:
            torch.testing.assert_close(rank[name]["gradients"][key], gradient, atol=1e-6, rtol=0)


def test_cached_gradients_draw_the_same_dropout_in_both_passes(answers: list[dict[str, Any]]) -> None:
    for rank in answers:
        cached = rank["cached dropout"]["gradients"]
        for key, gradient in rank["kept dropout"].items():
            torch.testing.assert_close(cached[key], gradient, atol=1e-6, rtol=0)
        assert not torch.allclose(cached["image.0.weight"], rank["cached"]["gradients"]["image.0.weight"], atol=1e-3)


def test_micro_batches_average_gradients_once(answers: list[dict[str, Any]]) -> None:
    for rank in answers:
        assert rank["cached"]["averaged"] == rank["plain"]["averaged"] == 1
