"""The symmetric contrastive loss of CLIP (Radford et al., 2021, arXiv 2103.00020) over the global batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ConfigError
from dermray.losses.gather import all_gather, gather_rows, mean_over_ranks, world
from dermray.losses.soft import Graded
from dermray.losses.tiled import tiled_clip_loss
from dermray.losses.tiles import duplicates, full_precision, promoted

Method = Literal["local", "dense", "tiled"]


class ClipLoss(nn.Module):
    """Mean of image-to-text and text-to-image cross-entropy; every other pair of the global batch is a negative.

    The mean over ranks of the returned value is the global loss, and averaging parameter gradients over ranks (as DDP
    does) gives exactly the gradient of the global loss. Every rank must hold the same number of samples. The methods
    differ in what they hold, n samples a rank and N in the global batch:

    - `local`: each rank the rows of its own samples in both directions, `[n, N]` twice;
    - `dense`: every rank the whole matrix, `[N, N]`; its value is the global loss on every rank;
    - `tiled`: neither, at the price of computing similarities twice (see `dermray.losses.tiled`).

    Products are formed in float32 whatever the features' dtype, also under autocast.
    """

    def __init__(self, method: Method = "local", tile_size: int | None = None) -> None:
        """Choose how to compute.

        Args:
            method: see above.
            tile_size: side of a tile in samples, for `tiled`; empty: what suits the device.

        Raises:
            ConfigError: an unknown method.
        """
        super().__init__()
        if method not in get_args(Method):
            raise ConfigError(f"no method {method!r} of the CLIP loss; there are {', '.join(get_args(Method))}")
        self.method = method
        self.tile_size = tile_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        labels: Tensor | None = None,
        *,
        graded: Graded | None = None,
    ) -> Tensor:
        """The loss of this rank's rows, a scalar.

        Args:
            image_features: L2-normalised, `[n, D]`.
            text_features: L2-normalised, `[n, D]`; row i belongs to image row i.
            logit_scale: exponentiated scale, a scalar or a number.
            labels: int64 `[n]`, or `[n, K]` for K kinds of equality, comparable over ranks. Two samples that agree in
                a label are no negatives of each other: their pair leaves both denominators. A sample's own pair stays.
            graded: targets that are shared out among samples of near diagnoses; None: a sample's own pair alone.

        Raises:
            ConfigError: `graded` with labels, or of shapes that do not fit.
        """
        with full_precision(image_features.device):
            image, text, scale = promoted(image_features, text_features, logit_scale)
            if self.method == "tiled":
                loss = tiled_clip_loss(image, text, scale, labels, self.tile_size)
            else:
                loss = (_local if self.method == "local" else _dense)(image, text, scale, labels)
            if graded is None:
                return loss
            added = graded.added(image, text, scale, labels)
            return loss + (mean_over_ranks(added) if self.method == "dense" else added)


def _local(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None) -> Tensor:
    rank, _ = world()
    first_row = rank * len(image)
    per_image, per_text = scale * image @ all_gather(text).T, scale * text @ all_gather(image).T
    if labels is not None:
        same = duplicates(labels, gather_rows(labels), first_row)
        per_image, per_text = (logits.masked_fill(same, -torch.inf) for logits in (per_image, per_text))
    return (_cross_entropy(per_image, first_row) + _cross_entropy(per_text, first_row)) / 2


def _dense(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None) -> Tensor:
    logits = scale * all_gather(image) @ all_gather(text).T
    if labels is not None:
        all_labels = gather_rows(labels)
        logits = logits.masked_fill(duplicates(all_labels, all_labels, 0), -torch.inf)
    return (_cross_entropy(logits, 0) + _cross_entropy(logits.T, 0)) / 2


def _cross_entropy(logits: Tensor, first_row: int) -> Tensor:
    """Of rows whose targets are the columns from `first_row` on."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) + first_row)
