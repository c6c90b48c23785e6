"""Losses over pairs written out plainly, and what several tests of the fast ones share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLIP_METHODS = ("local", "dense", "tiled")


def features(seed: int, num: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Image and text features of `num` samples, `[num, width]`, normalised."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, num, width, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(image, dim=1).to(dtype), nn.functional.normalize(text, dim=1).to(dtype)


def some_labels(seed: int, num: int, kinds: int | None) -> Tensor:
    """Labels of which many are equal: `[num]`, or `[num, kinds]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num,) if kinds is None else (num, kinds)
    return torch.randint(-2, max(num // 2, 1), shape, generator=generator)


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one == other).any())


def naive_clip(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy of each sample among the pairs that count, one at a time."""
    num = len(image)
    total = torch.zeros_like(scale)
    for queries, keys in ((image, text), (text, image)):
        for i in range(num):
            counted = [j for j in range(num) if j == i or labels is None or not same(labels[i], labels[j])]
            logits = torch.stack([scale * (queries[i] * keys[j]).sum() for j in counted])
            total = total - logits.log_softmax(0)[counted.index(i)]
    return total / (2 * num)


def naive_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None = None) -> Tensor:
    """Log-sigmoid of each pair that counts, one at a time."""
    num = len(image)
    total = torch.zeros_like(scale)
    for i in range(num):
        for j in range(num):
            if i == j or labels is None or not same(labels[i], labels[j]):
                logit = scale * (image[i] * text[j]).sum() + bias
                total = total - nn.functional.logsigmoid(logit if i == j else -logit)
    return total / num


def value_and_gradients(loss: Callable[..., Tensor], *tensors: Tensor, weight: float = 1.0) -> list[Tensor]:
    """The loss and the gradient of every tensor, where the loss enters with a weight."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    (weight * value).backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]
