"""CLIP's loss without its similarity matrix: memory O(n D + N D + tile), exact gradients.

One walk over the tiles of a rank's image rows against all texts serves both directions: it yields the rows'
log-sum-exp whole and the columns' in part, and ranks add their parts. Backward computes the tiles once more; the block
then holds everything that concerns the rank's images, and its share of the texts' gradients, which ranks add. The
tiling is that of Inf-CL (Cheng et al., 2024, arXiv 2410.17243); sharing the walk between directions is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dermray.losses.gather import gather_rows, log_sum_exp, sum_own_rows, world
from dermray.losses.tiles import TiledMatrix, full_precision, room


def tiled_clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, labels: Tensor | None, tile_size: int | None
) -> Tensor:
    """The rank's loss as `ClipLoss` defines it.

    The gradient of `logit_scale` is the rank's share: that of its image rows in both directions. Only its mean over
    ranks is that of the global loss.

    Args:
        image_features: `[n, D]`, of the dtype of the others, float32 or float64.
        text_features: `[n, D]`.
        logit_scale: without axes.
        labels: see `tiles.duplicates`.
        tile_size: side of a tile; empty: what suits the device.
    """
    return _TiledClipLoss.apply(image_features, text_features, logit_scale, labels, tile_size)


class _TiledClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None, tile_size: int | None
    ) -> Tensor:
        rank, _ = world()
        num_local = len(image)
        own = slice(rank * num_local, (rank + 1) * num_local)
        all_text = gather_rows(text)
        all_labels = None if labels is None else gather_rows(labels)
        matrix = _matrix(image * scale, all_text, labels, all_labels, tile_size)
        row_lse = image.new_full((num_local,), -torch.inf)
        column_lse = image.new_full((len(all_text),), -torch.inf)
        positives = image.new_empty(num_local)
        for tile in matrix:
            positives[tile.positive_rows] = tile.positives
            for running, axis in ((row_lse[tile.rows], 1), (column_lse[tile.columns], 0)):
                torch.logaddexp(running, tile.logits.logsumexp(axis), out=running)
        column_lse = log_sum_exp(column_lse)
        context.save_for_backward(image, all_text, scale, row_lse, column_lse, labels, all_labels)
        context.tile_size = tile_size
        return ((row_lse + column_lse[own]) / 2 - positives).mean()

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, all_text, scale, row_lse, column_lse, labels, all_labels = context.saved_tensors
        # Each softmax weighs as much as the loss of the rank that owns its row or column.
        row_weight = gradients[0] / (2 * len(image))
        column_weights = gather_rows(row_weight.reshape(1)).repeat_interleave(len(image))
        with full_precision(image.device):
            scaled = image * scale
            grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(all_text)
            matrix = _matrix(scaled, all_text, labels, all_labels, context.tile_size)
            spare = matrix.buffer()
            for tile in matrix:
                rows, columns, logits = tile.rows, tile.columns, tile.logits
                per_row = torch.sub(logits, row_lse[rows, None], out=room(spare, *logits.shape)).exp_()
                logits.sub_(column_lse[columns]).exp_().mul_(column_weights[columns])
                logits.addcmul_(per_row, row_weight)
                tile.positives.sub_(2 * row_weight)
                grad_image[rows].addmm_(logits, all_text[columns])
                grad_text[columns].addmm_(logits.T, scaled[rows])
            grad_scale = (image * grad_image).sum()
            return grad_image.mul_(scale), sum_own_rows(grad_text), grad_scale, None, None


def _matrix(
    scaled: Tensor, all_text: Tensor, labels: Tensor | None, all_labels: Tensor | None, tile_size: int | None
) -> TiledMatrix:
    rank, _ = world()
    return TiledMatrix(
        scaled,
        all_text,
        first_row=rank * len(scaled),
        tile_size=tile_size,
        row_labels=labels,
        column_labels=all_labels,
    )
