"""How numbers are computed, in one place: precision, memory layout, what is compiled and what is recomputed.

None of it changes what is computed, only its rounding; `train.precision` alone is part of the trajectory.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dermray import images
from dermray.train.settings import PretrainConfig, TrainConfig

aten = torch.ops.aten
# What takes a block's time: its matrix products and its attention, on whatever device and by whichever kernel.
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# Of one function, for different shapes of its arguments.
MAX_COMPILED_FORMS = 32


def settle(config: PretrainConfig, device: torch.device) -> None:
    """Equal seeds and, on CPU, a fixed number of threads: the order of additions must not depend on the machine.

    Without a GPU the process augments images itself, so it is settled for that too.
    """
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    else:
        images.use_one_core()
        torch.set_num_threads(config.threads_per_worker or max(1, (os.cpu_count() or 1) // config.most_workers))


def autocast(settings: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass: bf16 where `train.precision` says so."""
    if settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def prepare(model: nn.Module, settings: TrainConfig) -> None:
    """Lay out, recompute and compile as told; in place, and names in the state dict stay.

    Args:
        model: on its device, not yet in DistributedDataParallel.
    """
    if settings.channels_last:
        visual = model.get_submodule("visual")
        visual.to(memory_format=torch.channels_last)
        visual.register_forward_pre_hook(_to_channels_last)
    for blocks in residual_stacks(model):
        for number in recomputed(len(blocks), settings.grad_checkpointing):
            _recompute(blocks[number], keep_products=settings.grad_checkpointing_keeps == "products")
        if settings.compile:
            # Block by block: equal blocks share one compilation, and DDP still overlaps its communication.
            for block in blocks:
                block.compile()
    if settings.compile:
        # Both towers' recomputed blocks count against one limit, beyond which blocks run as they are. Texts come with
        # and without padding, alone and together, in one length and in many, in training and in validation: more than
        # torch's eight forms.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_FORMS)


def _recompute(block: nn.Module, *, keep_products: bool) -> None:
    """Let a block run again in the backward pass instead of keeping its inner results."""
    forward = block.forward

    # Functions that name their contexts: torch.compile leaves a module alone whose forward is a partial.
    def keeping(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=_keep_products, **options)

    def keeping_nothing(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    block.forward = keeping if keep_products else keeping_nothing


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a block's forward pass and of its second one, which takes from the first what is dear."""
    return create_selective_checkpoint_contexts(list(PRODUCTS))


def _to_channels_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    pixels: Tensor = inputs[0]
    return (pixels.contiguous(memory_format=torch.channels_last), *inputs[1:])


def residual_stacks(model: nn.Module) -> list[list[nn.Module]]:
    """The stacks of equal blocks that towers are made of, outermost first; blocks with batch norm are left out.

    Running a batch norm twice for one batch would count the batch twice in its running figures.
    """
    found: list[list[nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        blocks = list(module.children())
        if (
            not isinstance(module, nn.ModuleList | nn.Sequential)
            or len(blocks) < 2
            or len({type(block) for block in blocks}) > 1
            or not any(True for _ in blocks[0].children())
            or any(name.startswith(f"{outer}.") for outer in inside)
        ):
            continue
        inside.append(name)
        if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            found.append(blocks)
    return found


def recomputed(num_blocks: int, share: float) -> list[int]:
    """Which blocks of a stack run again in the backward pass: `share` of them, evenly spread."""
    return [n for n in range(num_blocks) if math.floor((n + 1) * share) > math.floor(n * share)]
