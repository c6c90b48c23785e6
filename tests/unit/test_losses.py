"""ClipLoss against a plain float64 reference, and two ranks against one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray.losses import ClipLoss
from dermray.losses.gather import all_gather, world

GLOBAL_BATCH = 8
WIDTH = 6


def features(seed: int, num: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, num, width, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(image, dim=1).to(dtype), nn.functional.normalize(text, dim=1).to(dtype)


def reference(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """The symmetric cross-entropy, written out over rows and columns."""
    logits = scale * image @ text.T
    total = 0.0
    for matrix in (logits, logits.T):
        for row in range(len(matrix)):
            peak = matrix[row].max()
            total += peak + np.log(np.exp(matrix[row] - peak).sum()) - matrix[row, row]
    return total / (2 * len(logits))


cases = st.tuples(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 16), st.floats(0.1, 100))


@given(cases)
@settings(deadline=None, max_examples=100)
def test_equals_the_plain_reference(case: tuple[int, int, int, float]) -> None:
    seed, num, width, scale = case
    image, text = features(seed, num, width)
    expected = reference(image.numpy(), text.numpy(), scale)
    assert ClipLoss()(image, text, torch.tensor(scale, dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )
    single = ClipLoss()(image.float(), text.float(), torch.tensor(scale, dtype=torch.float32))
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(cases, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_order_of_pairs_and_roles_of_towers_do_not_matter(case: tuple[int, int, int, float], random: object) -> None:
    seed, num, width, scale = case
    image, text = features(seed, num, width)
    order = list(range(num))
    random.shuffle(order)  # type: ignore[attr-defined]
    factor = torch.tensor(scale, dtype=torch.float64)
    loss = ClipLoss()(image, text, factor)
    torch.testing.assert_close(ClipLoss()(image[order], text[order], factor), loss, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ClipLoss()(text, image, factor), loss, atol=1e-9, rtol=1e-9)


def test_extremes() -> None:
    image, _ = features(0, 1, WIDTH)
    assert ClipLoss()(image, image, torch.tensor(100.0)).item() == 0
    same = image.expand(5, -1)
    assert ClipLoss()(same, same, torch.tensor(10.0)).item() == pytest.approx(np.log(5))
    orthogonal = torch.eye(4, dtype=torch.float64)
    assert ClipLoss()(orthogonal, orthogonal, torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-12)
    assert ClipLoss()(orthogonal, orthogonal.roll(1, 0), torch.tensor(100.0)).item() == pytest.approx(100, rel=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    image, text = (each.requires_grad_() for each in features(1, 4, 3))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ClipLoss(), (image, text, scale))


def test_alone_there_is_nothing_to_gather() -> None:
    local = torch.randn(2, 3)
    assert world() == (0, 1)
    assert all_gather(local) is local


class Towers(nn.Module):
    """Two linear towers and a learnt scale: the smallest thing with CLIP's parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Linear(10, WIDTH)
        self.text = nn.Linear(7, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normalise = nn.functional.normalize
        return normalise(self.image(images), dim=1), normalise(self.text(texts), dim=1), self.logit_scale.exp()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(GLOBAL_BATCH, 10, generator=generator), torch.randn(GLOBAL_BATCH, 7, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    model = Towers()
    wrapped = DistributedDataParallel(model)
    num = GLOBAL_BATCH // world_size
    rows = slice(rank * num, (rank + 1) * num)
    images, texts = inputs()
    loss = ClipLoss()(*wrapped(images[rows], texts[rows]))
    loss.backward()
    torch.save({"loss": loss.detach(), **gradients(model)}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_the_global_batch(tmp_path: object) -> None:
    """Two processes: through DDP, linear towers and the scale, against one process on all samples."""
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    model = Towers()
    loss = ClipLoss()(*model(*inputs()))
    loss.backward()
    expected = gradients(model)
    assert set(expected) == {"image.weight", "image.bias", "text.weight", "text.bias", "logit_scale"}
    ranks = [torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach(), atol=1e-6, rtol=0)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, "a vanishing gradient would prove nothing"
        for rank in ranks:
            torch.testing.assert_close(rank[name], gradient, atol=1e-6, rtol=0)
