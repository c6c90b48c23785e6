"""Gradients of a large batch through towers that only hold a small one: GradCache (Gao et al., 2021, arXiv 2101.06983).

The loss needs all features at once, the towers do not need all samples at once. The towers run over micro-batches
without a graph, the loss gives the gradient of every feature, and the towers run again, each micro-batch with a graph
that takes the features' gradients. The price is one more forward pass; the gradient is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Contexts = Callable[[], AbstractContextManager[Any]]


def cached_backward(
    encode: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    loss: Callable[..., Tensor],
    *,
    num_features: int = 2,
    micro_batch_size: int | None = None,
    autocast: Contexts = nullcontext,
    no_sync: Contexts = nullcontext,
) -> Tensor:
    """Add the gradient of `loss(*encode(*inputs))` to the parameters; return the loss, detached.

    Random numbers that the towers draw (dropout) are the same in both passes. Towers whose output for a sample
    depends on its batch (batch norm) see micro-batches, not the batch.

    Args:
        encode: inputs of m samples → features `[m, …]` of so many kinds (of images, of texts, of patches), then
            whatever scalars the loss learns (scale, bias). It may be a module in DistributedDataParallel.
        inputs: tensors `[n, …]` of one device, split along the first axis.
        loss: takes what `encode` returns, for all n samples; may talk to other ranks.
        num_features: how many of what `encode` returns are features, one row a sample.
        micro_batch_size: samples that go through the towers at once; empty: all, in one pass.
        autocast: makes the context of a forward pass.
        no_sync: makes the context in which gradients stay on the rank; used for all micro-batches but the last, so
            that ranks talk once.
    """
    parts = list(zip(*(each.split(micro_batch_size or len(each)) for each in inputs), strict=True))
    if len(parts) == 1:
        with autocast():
            outputs = encode(*inputs)
        value = loss(*outputs)
        value.backward()
        return value.detach()
    states, features, scalars = _encode_without_graph(encode, parts, autocast, num_features)
    value = loss(*features, *scalars)
    value.backward()
    lengths = [len(part[0]) for part in parts]
    gradients = [_gradient(each).split(lengths) for each in features]
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        last = number == len(parts) - 1
        with nullcontext() if last else no_sync():
            _set_random_state(state, part[0].device)
            with autocast():
                outputs = encode(*part)
            wanted = [each[number] for each in gradients]
            if last:
                wanted += [_gradient(each) for each in scalars]
            _backward(outputs, wanted)
    return value.detach()


def _encode_without_graph(
    encode: Callable[..., tuple[Tensor, ...]], parts: list[tuple[Tensor, ...]], autocast: Contexts, num_features: int
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Random states before each part, and features and the scalars as leaves that take gradients."""
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(part[0].device))
            with autocast():
                outputs.append(encode(*part))
    features = [torch.cat(column) for column in list(zip(*outputs, strict=True))[:num_features]]
    scalars = [each.detach().clone() for each in outputs[0][num_features:]]
    return states, [each.requires_grad_() for each in features], [each.requires_grad_() for each in scalars]


def _backward(outputs: tuple[Tensor, ...], gradients: list[Tensor]) -> None:
    """A frozen tower's features take no gradient."""
    pairs = [pair for pair in zip(outputs, gradients, strict=False) if pair[0].requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "the loss takes everything that encode returns"
    return leaf.grad


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
