"""The adaptive sparse pairwise loss over features with labels (Zhou et al., 2023, arXiv 2303.18247)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ConfigError
from dermray.losses.gather import all_gather, gather_rows
from dermray.losses.tiles import full_precision

# Of a pair that does not count. Finite, so that a batch of one label has a gradient, which is 0.
ABSENT = -1e9


class AdaSpLoss(nn.Module):
    """One positive and one negative pair for each label of the global batch, chosen softly among all of them.

    With logits `s / temperature` of all pairs, softly (log-sum-exp in place of maximum): the negative pair of a label
    is the most similar one of a member and a stranger. Of positive pairs `h` is the least similar one of the label, and
    `e` the best of what is worst for each member; the one that counts is `w h + (1 - w) e`, where w is the harmonic
    mean of both as similarities, without a gradient, and 0 where h is below 0: with members that are far apart h is
    often a mislabelled pair. The loss is the mean over labels of `log(1 + exp(negative - positive))`.

    As in the published code a member makes a pair with itself. Unlike there, labels may have any number of members, in
    any order.
    """

    def __init__(self, temperature: float = 0.04) -> None:
        """Choose.

        Args:
            temperature: what similarities are divided by.

        Raises:
            ConfigError: it is not above 0.
        """
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"the temperature of the AdaSP loss must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of the global batch, a scalar, the same on every rank.

        The mean over ranks of parameter gradients, as DDP makes it, is the gradient of the global loss. Every rank must
        hold the same number of rows. Memory grows with the square of the global batch: texts are many to a node, and
        few to a batch.

        Args:
            features: L2-normalised, `[n, D]`.
            labels: int64 `[n]`, comparable over ranks.
        """
        with full_precision(features.device):
            rows, of_rows = (
                all_gather(features.to(torch.promote_types(features.dtype, torch.float32))),
                gather_rows(labels),
            )
            logits = rows @ rows.T / self.temperature
            same = of_rows[:, None] == of_rows[None]
            worst = -_log_sum_exp(-logits, same)
            hard, easy = -_log_sum_exp(-worst, same), _log_sum_exp(worst, same)
            negative = _log_sum_exp(_log_sum_exp(logits, ~same), same)
            # [5, 5, 7]: each label counts once, so its members count 1/2, 1/2 and 1.
            shares = 1 / same.sum(dim=1)
            losses = F.softplus(negative - self._positive(hard, easy))
            return (losses * shares).sum() / shares.sum()

    def _positive(self, hard: Tensor, easy: Tensor) -> Tensor:
        """Logits of the positive pair of each row's label, `[N]`."""
        h, e = hard.detach() * self.temperature, easy.detach() * self.temperature
        weight = torch.where(h > 0, 2 * h * e / (h + e).clamp(min=torch.finfo(h.dtype).tiny), 0.0)
        return weight * hard + (1 - weight) * easy


def _log_sum_exp(logits: Tensor, counted: Tensor) -> Tensor:
    """Of each row of `[N, N]`, or of one row `[N]` for all, over the columns that count for it: `[N]`."""
    return logits.expand(counted.shape).masked_fill(~counted, ABSENT).logsumexp(dim=1)
