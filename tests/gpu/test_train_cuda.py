"""The training step and the loss on CUDA: parity with the CPU, precision, memory, DDP over NCCL."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray.errors import DeviceMemoryError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.memory import BatchMemory
from dermray.losses import ClipLoss
from dermray.train import failures, numerics
from dermray.train.objectives.contrastive.module import Contrastive
from dermray.train.settings import TrainConfig
from tests.contrastive import features, value_and_gradients
from tests.unit.test_train_loop import configured
from tests.unit.test_train_ranks import clip_trainer, global_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DATA = {"color_jitter": (0.3, 0.3, 0.3, 0.1)}


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Comparisons with the CPU want no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def loss_and_gradients(
    model: nn.Module, device: torch.device, precision: str, micro_batch_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one batch with padded and equal texts."""
    config = configured(data=DATA)
    color = ColorAugmentation(config.data, config.seed)
    task = Contrastive((0.5,) * 3, (0.2,) * 3, device, color, config.loss, micro_batch_size)
    settings = TrainConfig.model_validate({"precision": precision})
    model.zero_grad()
    autocast = functools.partial(numerics.autocast, settings, device)
    loss = task.backward(model, global_batch(0), device, autocast).loss
    return loss.cpu(), {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_float32_step_is_that_of_the_cpu() -> None:
    model = clip_trainer(configured(), 1).model
    expected_loss, expected = loss_and_gradients(model, CPU, "fp32")
    for micro_batch_size in (None, 5):
        loss, got = loss_and_gradients(copy.deepcopy(model).to(CUDA), CUDA, "fp32", micro_batch_size)
        torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-3 * float(gradient.abs().max()) + 1e-6, rtol=0)


def test_a_bf16_step_keeps_float32_weights_and_points_the_same_way() -> None:
    model = clip_trainer(configured(), 1).model
    expected_loss, expected = loss_and_gradients(model, CPU, "fp32")
    on_gpu = copy.deepcopy(model).to(CUDA)
    loss, got = loss_and_gradients(on_gpu, CUDA, "auto")
    assert {p.dtype for p in on_gpu.parameters()} == {torch.float32}
    torch.testing.assert_close(loss, expected_loss, atol=0.05, rtol=0.02)
    one, other = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (got, expected))
    assert nn.functional.cosine_similarity(one, other, dim=0) > 0.98


def test_compiled_blocks_that_are_recomputed_give_the_same_gradients() -> None:
    plain = clip_trainer(configured(), 1).model.to(CUDA)
    changed = copy.deepcopy(plain)
    settings = {"compile": True, "grad_checkpointing": 0.5, "grad_checkpointing_keeps": "products"}
    numerics.prepare(changed, TrainConfig.model_validate(settings))
    expected_loss, expected = loss_and_gradients(plain, CUDA, "fp32")
    loss, got = loss_and_gradients(changed, CUDA, "fp32")
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-3 * float(gradient.abs().max()) + 1e-6, rtol=0)


def test_a_full_memory_is_explained() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(256 / (torch.cuda.mem_get_info()[1] >> 20))
    try:
        with pytest.raises(DeviceMemoryError, match="micro_batch_size below 64"), failures.memory_explained(64):
            torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_two_optimiser_steps_are_those_of_the_cpu() -> None:
    config = configured(optim={"lr": 1e-3, "warmup_steps": 0, "eps": 1e-4}, train={"precision": "fp32"})
    weights = []
    for device in (CPU, CUDA):
        trainer = clip_trainer(config, 1)
        trainer.model.to(device)
        trainer.device = device
        trainer.left_out = trainer.left_out.to(device)
        trainer.objective = Contrastive((0.5,) * 3, (0.2,) * 3, device, ColorAugmentation(config.data, 0), config.loss)
        for step in range(2):
            trainer.train_step(global_batch(step))
        weights.append({name: value.detach().cpu() for name, value in trainer.model.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["dense", "local", "tiled"])
def test_the_loss_on_cuda_is_that_of_the_cpu(method: str) -> None:
    image, text = features(3, 300, 32, torch.float32)
    scale = torch.tensor(20.0)
    expected = value_and_gradients(ClipLoss("dense"), image.double(), text.double(), scale.double())
    loss = ClipLoss(method, tile_size=128)  # type: ignore[arg-type]
    for got, wanted in zip(value_and_gradients(loss, image.cuda(), text.cuda(), scale.cuda()), expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, atol=1e-5, rtol=1e-4)


def test_tiles_take_a_sixteenth_of_the_dense_memory_at_32k() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("the dense loss at 32k needs 24 GiB of free memory")
    image, text = features(3, 32768, 512, torch.float32)
    image, text, scale = image.cuda(), text.cuda(), torch.tensor(20.0, device=CUDA)
    peaks = {}
    for method in ("tiled", "dense"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value_and_gradients(ClipLoss(method), image, text, scale)  # type: ignore[arg-type]
        peaks[method] = torch.cuda.max_memory_allocated() - before
    assert peaks["tiled"] * 16 <= peaks["dense"]


def test_ddp_over_nccl_gives_the_same_gradients(tmp_path: Path) -> None:
    plain = clip_trainer(configured(), 1).model.to(CUDA)
    _, expected = loss_and_gradients(plain, CUDA, "fp32")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(plain), device_ids=[0], gradient_as_bucket_view=True)
        for micro_batch_size in (None, 5):
            _, got = loss_and_gradients(wrapped, CUDA, "fp32", micro_batch_size)
            for name, gradient in expected.items():
                torch.testing.assert_close(got[f"module.{name}"], gradient, atol=1e-4, rtol=1e-3)
    finally:
        dist.destroy_process_group()


def test_batches_lie_in_page_locked_memory_that_copies_may_outlive() -> None:
    memory = BatchMemory()
    copies = []
    for value in range(8):
        pixels = memory.empty("pixels", (64, 32, 32, 3), np.dtype(np.uint8)).fill_(value).permute(0, 3, 1, 2)
        assert pixels.is_pinned()
        copies.append(pixels.to(CUDA, non_blocking=True))
        del pixels
    assert [int(one.min()) for one in copies] == [int(one.max()) for one in copies] == list(range(8))
