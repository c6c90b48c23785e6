"""The sigmoid loss of SigLIP (Zhai et al., 2023, arXiv 2303.15343) over the global batch, in tiles and round a ring."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dermray.losses.gather import gather_rows, pass_right, world
from dermray.losses.soft import Graded
from dermray.losses.tiles import TiledMatrix, full_precision, promoted

# log(1 + exp(x)) is exact in float32 up to here; torch's own default bends the curve at 20.
SOFTPLUS_LINEAR_FROM = 50.0


class SigLipLoss(nn.Module):
    """Binary cross-entropy of every image with every text of the global batch, summed, over the number of samples.

    Each rank compares its images with the texts of all ranks, of which it holds one rank's at a time: blocks of texts
    travel round the ring of ranks, and their gradients with them. Similarities exist one tile at a time. There is no
    normaliser over the batch, so gradients are ready with the loss, and backward only scales them.

    The mean over ranks of the returned value is the global loss, and averaging parameter gradients over ranks (as DDP
    does) gives exactly the gradient of the global loss, if the loss is weighted alike on all ranks. Every rank must
    hold the same number of samples. Products are formed in float32 whatever the features' dtype, also under autocast.
    """

    def __init__(self, tile_size: int | None = None) -> None:
        """`tile_size`: side of a tile in samples; empty: what suits the device."""
        super().__init__()
        self.tile_size = tile_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        labels: Tensor | None = None,
        *,
        graded: Graded | None = None,
    ) -> Tensor:
        """The loss of this rank's images, a scalar.

        Args:
            image_features: L2-normalised, `[n, D]`.
            text_features: L2-normalised, `[n, D]`; row i belongs to image row i.
            logit_scale: exponentiated scale, a scalar or a number.
            logit_bias: added to every logit, a scalar or a number.
            labels: int64 `[n]`, or `[n, K]` for K kinds of equality, comparable over ranks. Two samples that agree in
                a label are no negatives of each other: their pair leaves the sum. A sample's own pair stays.
            graded: targets that are shared out among samples of near diagnoses; None: a sample's own pair alone.

        Raises:
            ConfigError: `graded` with labels, or of shapes that do not fit.
        """
        with full_precision(image_features.device):
            tensors = promoted(image_features, text_features, logit_scale, logit_bias)
            wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            loss = _SigLipLoss.apply(*tensors, labels, self.tile_size, wants_gradients)
            if graded is None:
                return loss
            image, text, scale, _ = tensors
            return loss + graded.added(image, text, scale, labels, sigmoid=True)


class _SigLipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Tensor | None,
        tile_size: int | None,
        wants_gradients: bool,
    ) -> Tensor:
        sums = _Sums(image, scale, bias)
        rank, world_size = world()
        all_labels = None if labels is None else gather_rows(labels)
        blocks = [text, torch.zeros_like(text)] if wants_gradients else [text]
        for hop in range(world_size):
            owner = (rank - hop) % world_size
            column_labels = None if all_labels is None else all_labels[owner * len(text) : (owner + 1) * len(text)]
            matrix = TiledMatrix(
                sums.scaled,
                blocks[0],
                # The partners of another rank's texts lie outside the block.
                first_row=0 if owner == rank else len(text),
                tile_size=tile_size,
                row_labels=labels,
                column_labels=column_labels,
            )
            sums.add(matrix, *blocks)
            if hop < world_size - 1:
                blocks = pass_right(blocks)
            elif world_size > 1 and wants_gradients:
                # One more hop brings the gradients home.
                blocks = pass_right(blocks[1:])
        if wants_gradients:
            grad_scale = (image * sums.grad_image).sum()
            context.save_for_backward(sums.grad_image.mul_(scale), blocks[-1], grad_scale, sums.grad_bias)
            context.num_local = len(image)
        return sums.loss / len(image)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight = gradients[0] / context.num_local
        return *(weight * gradient for gradient in context.saved_tensors), None, None, None


class _Sums:
    """What one rank's images add up over blocks of texts: the loss and, where wanted, gradients."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor) -> None:
        self.scaled = image * scale
        self.loss = torch.zeros_like(scale)
        self.grad_image = torch.zeros_like(image)
        self.grad_bias = torch.zeros_like(bias)
        self._bias = bias

    def add(self, matrix: TiledMatrix, text: Tensor, grad_text: Tensor | None = None) -> None:
        """Take in a block of texts `[n, D]`; adds to `grad_text`. -inf is a pair that does not count."""
        for tile in matrix:
            logits = tile.logits.add_(self._bias)
            positives = tile.positives.clone()
            tile.positives.fill_(-torch.inf)
            self.loss += F.softplus(logits, threshold=SOFTPLUS_LINEAR_FROM).sum()
            self.loss += F.softplus(-positives, threshold=SOFTPLUS_LINEAR_FROM).sum()
            if grad_text is None:
                continue
            logits.sigmoid_()
            tile.positives.copy_(-(-positives).sigmoid_())
            self.grad_bias += logits.sum()
            self.grad_image[tile.rows].addmm_(logits, text[tile.columns])
            grad_text[tile.columns].addmm_(logits.T, self.scaled[tile.rows])
