"""Log-sum-exp of images over all texts, and of texts over all images, without their matrix.

One walk over the tiles of a rank's images against the texts of all ranks serves both directions, as in
`dermray.losses.tiled`; an image here has N texts of its own, so its positives are no diagonal and are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dermray.losses.gather import gather_rows, log_sum_exp, world
from dermray.losses.tiles import Tile, TiledMatrix, duplicates, full_precision, room


@dataclass(frozen=True)
class Pairs:
    """Which pairs of a rank's n images with all T texts count, N texts an image.

    Attributes:
        texts_per_image: N.
        tile_size: side of a tile; None: what suits the device.
        column_bias: `[T]`, -inf for a text that no image is compared with and 0 for the others; None: all are.
        row_labels: int64 `[n, K]`; a pair of equal labels of one kind is no negative, unless the text is the image's.
        column_labels: int64 `[T, K]`.
    """

    texts_per_image: int
    tile_size: int | None
    column_bias: Tensor | None = None
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None

    def matrix(self, rows: Tensor, columns: Tensor) -> TiledMatrix:
        """The similarities of `[n, D]` with `[T, D]`; row and column of one number are no partners here."""
        return TiledMatrix(rows, columns, first_row=len(columns), tile_size=self.tile_size)

    def mask(self, tile: Tile, num_rows: int) -> None:
        """Make -inf of the tile's pairs that are no negatives."""
        if self.row_labels is None or self.column_labels is None:
            return
        height, width = tile.logits.shape
        same = duplicates(self.row_labels[tile.rows], self.column_labels[tile.columns], width)
        first_row = world()[0] * num_rows + tile.rows.start
        device = tile.logits.device
        owners = torch.arange(tile.columns.start, tile.columns.stop, device=device) // self.texts_per_image
        same &= owners != torch.arange(first_row, first_row + height, device=device)[:, None]
        tile.logits.masked_fill_(same, -torch.inf)


def log_normalisers(rows: Tensor, columns: Tensor, pairs: Pairs, *, both: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each of the rank's images over all texts, `[n]`, and of its texts over all images, `[n * N]`.

    Args:
        rows: of the rank's images, times the logit scale, `[n, D]`.
        columns: of all ranks' texts, sample by sample, `[T, D]`; their gradient is the rank's share.
        pairs: which of them count.
        both: False: the texts' are not computed, and are zeros.
    """
    return _LogNormalisers.apply(rows, columns, pairs, both)


class _LogNormalisers(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, columns: Tensor, pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
        num_own = len(rows) * pairs.texts_per_image
        row_lse = rows.new_full((len(rows),), -torch.inf)
        column_lse = rows.new_full((len(columns),), -torch.inf)
        for tile in pairs.matrix(rows, columns):
            pairs.mask(tile, len(rows))
            if both:
                running = column_lse[tile.columns]
                torch.logaddexp(running, tile.logits.logsumexp(0), out=running)
            if pairs.column_bias is not None:
                tile.logits.add_(pairs.column_bias[tile.columns])
            running = row_lse[tile.rows]
            torch.logaddexp(running, tile.logits.logsumexp(1), out=running)
        # An image that is compared with no text has no loss, but would have gradients that are no numbers.
        row_lse.masked_fill_(row_lse == -torch.inf, 0)
        column_lse = log_sum_exp(column_lse) if both else torch.zeros_like(column_lse)
        context.save_for_backward(rows, columns, row_lse, column_lse)
        context.pairs, context.both = pairs, both
        return row_lse, column_lse[world()[0] * num_own :][:num_own].clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, row_lse, column_lse = context.saved_tensors
        pairs, of_rows = context.pairs, gradients[0]
        of_columns = gather_rows(gradients[1]) if context.both else None
        with full_precision(rows.device):
            grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
            matrix = pairs.matrix(rows, columns)
            spare = matrix.buffer() if context.both else None
            for tile in matrix:
                pairs.mask(tile, len(rows))
                logits, per_text = tile.logits, None
                if of_columns is not None and spare is not None:
                    per_text = torch.sub(logits, column_lse[tile.columns], out=room(spare, *logits.shape)).exp_()
                    per_text.mul_(of_columns[tile.columns])
                if pairs.column_bias is not None:
                    logits.add_(pairs.column_bias[tile.columns])
                logits.sub_(row_lse[tile.rows, None]).exp_().mul_(of_rows[tile.rows, None])
                if per_text is not None:
                    logits.add_(per_text)
                grad_rows[tile.rows].addmm_(logits, columns[tile.columns])
                grad_columns[tile.columns].addmm_(logits.T, rows[tile.rows])
        return grad_rows, grad_columns, None, None
