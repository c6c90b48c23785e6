"""MAKE's objective written out plainly, one pair at a time, and samples to compare it on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MakeInputs(NamedTuple):
    """`[B, D]`, `[B, D]`, `[B, N, D]`, bool `[B, N]`, a scalar."""

    image: Tensor
    local: Tensor
    text: Tensor
    valid: Tensor
    scale: Tensor


def make_inputs(seed: int, num: int, texts: int, width: int = 6) -> MakeInputs:
    """Samples of which many lack some text, but none all."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    valid = torch.rand(num, texts, generator=generator) < 0.7
    valid[:, 0] |= ~valid.any(dim=1)
    scale = torch.tensor(6.0, dtype=torch.float64)
    return MakeInputs(unit(num, width), 1.3 * unit(num, width), unit(num, texts, width), valid, scale)


def some_similarity(classes: int) -> Tensor:
    """Symmetric, 1 on the diagonal, in [0, 1]."""
    generator = torch.Generator().manual_seed(classes)
    similarity = torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    return ((similarity + similarity.T) / 2).fill_diagonal_(1)


def naive_weights(text: Tensor, valid: Tensor) -> Tensor:
    """Of each text, `[B, N]`."""
    weights = torch.ones(valid.shape, dtype=text.dtype)
    for i in range(len(text)):
        subs = [n for n in range(3, text.shape[1]) if valid[i, n]]
        if not subs or not valid[i, 1]:
            continue
        shares = torch.stack([(text[i, 1] * text[i, n]).sum() for n in subs]).softmax(0)
        for n, share in zip(subs, shares / shares.max(), strict=True):
            weights[i, n] = share.detach()
    return weights


def naive_make(
    given: MakeInputs,
    *,
    negatives: str = "all",
    labels: Tensor | None = None,
    similarity: Tensor | None = None,
    beta: float = 0.5,
    kl: bool = False,
    samples: Tensor | None = None,
    texts: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms `i2t`, `t2i` and `local`."""
    image, local, text, valid, scale = given
    num, per_image = valid.shape
    weights = naive_weights(text, valid)

    def is_pair(i: int, j: int, n: int) -> bool:
        """Whether image i and text n of sample j are compared."""
        if i == j:
            return True
        same = samples is not None and bool((samples[i] == samples[j]).any())
        return not same and not (texts is not None and bool((texts[i] == texts[j, n]).any()))

    def similar(i: int, j: int) -> float:
        if labels is None or similarity is None or labels[i] < 0 or labels[j] < 0:
            return 0.0
        return float(similarity[labels[i], labels[j]])

    def score(logits: dict[Any, Tensor], own: Any, likeness: dict[Any, float], soft: bool) -> Tensor:
        """Of one row: its columns, which of them is its own, and how like each is."""
        chances = torch.stack(list(logits.values())).log_softmax(0)
        target = torch.tensor([float(column == own) for column in logits], dtype=chances.dtype)
        if soft:
            q = torch.tensor([1.0 if column == own else likeness[column] for column in logits], dtype=chances.dtype)
            target = (1 - beta) * target + beta * (q / 0.07).softmax(0)
        entropy = sum(math.log(share) * share for share in target.tolist() if share) if soft and kl else 0.0
        return -(target * chances).sum() + entropy

    sums = {name: [torch.zeros(()), torch.zeros(())] for name in ("i2t", "t2i", "local")}

    def add(name: str, weight: Tensor, value: Tensor) -> None:
        sums[name] = [sums[name][0] + weight * value, sums[name][1] + weight]

    columns = [(j, n) for j in range(num) for n in range(per_image)]
    for i in range(num):
        counted = [c for c in columns if is_pair(i, *c) and (negatives == "all" or valid[c])]
        like = {c: similar(i, c[0]) for c in counted}
        for n in (n for n in range(per_image) if valid[i, n]):
            rows = {
                name: {c: scale * (v[i] * text[c]).sum() for c in counted}
                for name, v in zip("vu", (image, local), strict=True)
            }
            add("i2t", weights[i, n], score(rows["v"], (i, n), like, labels is not None))
            if n:
                add("local", weights[i, n], score(rows["u"], (i, n), like, False))
            of_text = {j: scale * (image[j] * text[i, n]).sum() for j in range(num) if is_pair(j, i, n)}
            weight = torch.ones(()) if labels is None else weights[i, n]
            add("t2i", weight, score(of_text, i, {j: similar(i, j) for j in of_text}, labels is not None))
    return {name: total / weight if weight else total for name, (total, weight) in sums.items()}
