"""O-MAKE's soft targets: what a sample is compared with counts by how near the two diagnoses stand in the tree.

The target of a text or image c in row r is `(1 - beta) * [c = r] + beta * p(c)`, with p(c) proportional to
`exp(q / temperature)`; q is the similarity of the two samples' diagnoses, 0 where one of them has none, and 1 for r
itself. The sum of such targets times logits is a product with sums over diagnoses, so that nothing here is as large as
the batch times the batch: memory is linear in the batch, and in the diagnoses times the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dermray.errors import ConfigError
from dermray.losses.gather import all_gather, gather_rows


@dataclass(frozen=True)
class Means:
    """The soft targets of each row applied to its logits.

    Attributes:
        logits: mean of a row's logits by its soft targets, `[n, N]`.
        negentropy: sum of target times log target over a row's columns, hard part included, `[n, 1]`.
    """

    logits: Tensor
    negentropy: Tensor


class SoftTargets:
    """Targets graded by diagnosis, of a rank's n samples over the global batch."""

    def __init__(self, labels: Tensor, similarity: Tensor, *, temperature: float, beta: float) -> None:
        """Take diagnoses.

        Args:
            labels: int64 `[n]`, a row of `similarity`, or below 0 for a sample without a diagnosis. One of C or more
                makes the loss NaN: to refuse it would wait for the device.
            similarity: `[C, C]`, 1 on the diagonal and at most 1 elsewhere; of the dtype and device of features.
            temperature: divides similarities.
            beta: share of the soft targets, above 0.

        Raises:
            ConfigError: shapes do not fit.
        """
        if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or labels.ndim != 1:
            raise ConfigError(
                "MAKE's loss: needs labels [B] and similarity [C, C], "
                f"got {list(labels.shape)} and {list(similarity.shape)}"
            )
        # No diagnosis is one more class, which is like no other and not like itself. Less 1, exp() cannot overflow.
        self._exponents = (torch.nn.functional.pad(similarity, (0, 1, 0, 1)) - 1) / temperature
        self._kernel = self._exponents.exp()
        self._beta = beta
        self._own = self._one_hot(labels)
        self._everyone = self._one_hot(gather_rows(labels))

    def _one_hot(self, labels: Tensor) -> Tensor:
        """`[n, C + 1]`. Products with it add in a fixed order, which scattering does not on a GPU."""
        classes = torch.arange(len(self._kernel), device=labels.device)
        last = len(self._kernel) - 1
        wrapped = torch.where(labels < 0, last, labels)
        found = (wrapped[:, None] == classes).to(self._kernel.dtype)
        return found.masked_fill((labels >= last)[:, None], torch.nan)

    def means(self, queries: Tensor, own_logits: Tensor, keys: Tensor, counts: Tensor) -> Means:
        """Over all columns that the keys stand for.

        Args:
            queries: `[n, Q, D]`, times the logit scale; Q is 1 where all rows of a sample are alike.
            own_logits: of each row with its own column, `[n, N]`.
            keys: of the rank's samples, sums over the columns of each, `[n, D]`; differentiable.
            counts: how many columns those are, `[n]`.
        """
        by_class = self._everyone.T @ all_gather(keys)
        num = self._everyone.T @ gather_rows(counts)
        sums = self._own @ (self._kernel @ by_class)
        # The row's own column is in there as one of its diagnosis, which 1 is to stand for; of a sample that has none
        # (all its texts are invalid, and nothing of it counts) it is not.
        own_exponent = self._own @ self._exponents.diagonal()
        own_kernel = own_exponent.exp().masked_fill(counts == 0, 0)
        others = self._own @ (self._kernel @ num) - own_kernel
        total = others + 1
        logits = (queries * sums[:, None, :]).sum(dim=2) + (1 - own_kernel)[:, None] * own_logits
        exponents = self._own @ ((self._kernel * self._exponents) @ num) - own_kernel * own_exponent
        log_share = math.log(self._beta) - total.log()
        own_target = (1 - self._beta) + self._beta / total
        negentropy = self._beta / total * (others * log_share + exponents) + torch.xlogy(own_target, own_target)
        return Means(logits / total[:, None], negentropy[:, None])
