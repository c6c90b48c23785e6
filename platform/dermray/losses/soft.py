"""O-MAKE's soft targets (arXiv 2512.03445): targets count by how near two diagnoses stand in the disease tree.

The target of a text or image c in row r is `(1 - beta) * [c = r] + beta * p(c)`, with p(c) proportional to
`exp(q / temperature)`; q is the similarity of the two samples' diagnoses, 0 where one of them has none, and 1 for r
itself. The sum of such targets times logits is a product with sums over diagnoses, so that nothing here is as large as
the batch times the batch: memory is linear in the batch, and in the diagnoses times the batch.

MAKE's objective has them for several texts of a sample, CLIP's and SigLIP's losses for one (`pair_terms`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dermray.errors import ConfigError
from dermray.losses.gather import all_gather, gather_rows

Divergence = Literal["cross_entropy", "kl"]


@dataclass(frozen=True)
class Graded:
    """Diagnoses of a rank's samples, and how they grade the targets of a loss over pairs.

    Attributes:
        labels: int64 `[n]`, rows of `similarity`, -1 without a diagnosis.
        similarity: `[C, C]` between diagnoses, as of `Ontology.similarity`.
        temperature: what similarities are divided by, above 0.
        beta: share of the soft targets in the targets, in [0, 1]; 0 leaves hard ones.
        divergence: kl is cross_entropy less a number that has no gradient.
    """

    labels: Tensor
    similarity: Tensor
    temperature: float = 0.07
    beta: float = 0.5
    divergence: Divergence = "cross_entropy"

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ConfigError: names the choice.
        """
        if self.divergence not in get_args(Divergence):
            raise ConfigError(
                f"soft targets: no divergence {self.divergence!r}; there are {', '.join(get_args(Divergence))}"
            )
        if not self.temperature > 0 or not 0 <= self.beta <= 1:
            raise ConfigError(
                f"soft targets: need temperature > 0 and beta in [0, 1], got {self.temperature} and {self.beta}"
            )

    def added(
        self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None, *, sigmoid: bool = False
    ) -> Tensor:
        """What they add to a loss of `[n, D]` and `[n, D]` with hard targets, `[]`; see `SoftTargets.pair_terms`.

        Args:
            image, text, scale: of the loss.
            labels: what makes pairs no negatives; there must be none, for such pairs are targets here.
            sigmoid: of SigLIP's loss.

        Raises:
            ConfigError: there are such labels, or shapes do not fit.
        """
        if labels is not None:
            raise ConfigError(
                "soft targets already share a target out among samples of one diagnosis; "
                "use them, or leave duplicates out, not both"
            )
        if self.labels.shape != (len(image),):
            raise ConfigError(f"soft targets: need labels [{len(image)}], got {list(self.labels.shape)}")
        similarity = torch.as_tensor(self.similarity).to(image)
        if not self.beta:
            return image.new_zeros(())
        soft = SoftTargets(self.labels, similarity, temperature=self.temperature, beta=self.beta)
        return soft.pair_terms(image, text, scale, divergence=self.divergence, sigmoid=sigmoid)


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
                "soft targets: need labels [B] and similarity [C, C], "
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

    def sigmoid_negentropy(self) -> Tensor:
        """Of targets of one text an image, each pair's a chance of its own: their negative entropies, `[]`.

        The sum over all pairs of the global batch, over its samples. A pair's target depends on the two diagnoses and
        on whether it is a sample's own, so that it is a sum over pairs of diagnoses.
        """
        counts = self._everyone.sum(dim=0)
        own_kernel = self._kernel.diagonal()
        # 1 stands for the row's own column. A diagnosis that does not occur is counted 0 times below.
        totals = self._kernel @ counts - own_kernel + 1
        totals = totals.where(counts > 0, 1)
        target = self._beta * self._kernel * (1 / totals[:, None] + 1 / totals) / 2
        pairs = torch.outer(counts, counts) - counts.diag()
        own = 1 - self._beta + self._beta / totals
        return ((pairs * _negentropy(target)).sum() + (counts * _negentropy(own)).sum()) / counts.sum()

    def pair_terms(
        self, image: Tensor, text: Tensor, scale: Tensor, *, divergence: Divergence, sigmoid: bool = False
    ) -> Tensor:
        """What soft targets add to a loss over pairs with hard ones: of this rank's samples, a mean over them, `[]`.

        The mean over ranks is what they add to the global loss. For softmax that is the mean of both directions; for
        the sigmoid a pair's target is the mean of what the two directions give it, so that an image's targets add up
        to about 1 as hard ones do, and the bias, which is in all logits, falls out.

        Args:
            image: L2-normalised, `[n, D]`.
            text: L2-normalised, `[n, D]`.
            scale: of the logits.
            divergence: `kl` subtracts the targets' entropy, a number without a gradient.
            sigmoid: whether a pair's target is a chance of its own, as in SigLIP's loss.
        """
        logits = (scale * image * text).sum(dim=1, keepdim=True)
        ones = logits.new_ones(len(logits))
        both = [
            self.means(scale * queries[:, None], logits, keys, ones) for queries, keys in ((image, text), (text, image))
        ]
        added = self._beta * (logits - (both[0].logits + both[1].logits) / 2).mean()
        if divergence == "cross_entropy":
            return added
        if sigmoid:
            return added + self.sigmoid_negentropy()
        return added + (both[0].negentropy + both[1].negentropy).mean() / 2


def beta_at(beta: float, epoch: int, epochs: int | None) -> float:
    """The share of soft targets in an epoch of O-MAKE's curriculum: half a cosine from `beta` down to 0.

    Args:
        beta: of the first epoch.
        epoch: from 0.
        epochs: the share is 0 from this epoch on; None: no curriculum.
    """
    return beta if epochs is None else beta * (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2


def _negentropy(chance: Tensor) -> Tensor:
    """Of a yes or no, elementwise; 0 where it is certain. Rounding may have brought a chance beyond 1."""
    rest = (1 - chance).clamp(min=0)
    return torch.xlogy(chance, chance) + torch.xlogy(rest, rest)
