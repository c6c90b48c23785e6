"""MAKE's objective over the global batch: whole images, and patches, against several texts of every sample.

Texts lie sample by sample: row `i * N + n` of the flat list is text n of sample i, in the order raw caption, ontology
caption, concept caption, sub-captions. An image is compared with all of them once, whatever their number: the loss of
each of its texts differs only in the logit that is taken from the row, so no matrix is repeated N times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dermray.errors import ConfigError
from dermray.losses.gather import all_gather, gather_rows, mean_over_ranks, world
from dermray.losses.make.normalisers import Pairs, log_normalisers
from dermray.losses.make.patches import local_vectors as vectors_of_patches
from dermray.losses.make.settings import MakeSettings
from dermray.losses.make.weighting import Counted, counted
from dermray.losses.soft import Divergence, SoftTargets
from dermray.losses.tiles import full_precision, promoted


@dataclass(frozen=True)
class Terms:
    """The parts of the objective, scalars of the global batch; also by name, `terms["mkcl"]`, and in a row.

    Attributes:
        total: `lambda_m * mkcl + lambda_s * local`.
        mkcl: mean of the two directions over whole images.
        i2t: image to text.
        t2i: text to image.
        local: patches to text.
    """

    total: Tensor
    mkcl: Tensor
    i2t: Tensor
    t2i: Tensor
    local: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """The term of a name."""
        return getattr(self, name)

    def __iter__(self) -> Iterator[Tensor]:
        """Total, mkcl, i2t, t2i, local."""
        return (self[field.name] for field in fields(self))

    def detached(self) -> Terms:
        """The same numbers without their graph."""
        return Terms(*(term.detach() for term in self))


def objective(
    image_features: Tensor,
    local_vectors: Tensor,
    text_features: Tensor,
    valid: Tensor,
    logit_scale: Tensor | float,
    *,
    weights: bool = True,
    labels: Tensor | None = None,
    similarity: Tensor | np.ndarray | None = None,
    temperature: float = 0.07,
    beta: float = 0.5,
    divergence: Divergence = "cross_entropy",
    lambda_m: float = 1.0,
    lambda_s: float = 0.7,
    **choices: Any,
) -> Terms:
    """The objective, given what `local_vectors` made of the patches.

    Every rank gets the terms of the global batch; averaging parameter gradients over ranks, as DDP does, gives exactly
    their gradients, if the loss is weighted alike on all ranks. Every rank must hold the same number of samples.
    Nothing waits for the device. A batch without any valid text gives 0.

    Args:
        image_features: L2-normalised, `[B, D]`.
        local_vectors: `[B, D]`.
        text_features: L2-normalised, `[B, N, D]`.
        valid: bool or integer `[B, N]`; of what is not, the features only serve as negatives.
        logit_scale: exponentiated scale, a scalar or a number.
        labels: int64 `[B]`, rows of `similarity`, -1 without a diagnosis; None: hard targets, and the text-to-image
            part is a plain mean over valid texts. With labels each text has its own weight in it.
        similarity: `[C, C]` between diagnoses, as of `Ontology.similarity`; with labels.
        weights, temperature, beta, divergence, lambda_m, lambda_s, choices: fields of `MakeSettings`.

    Raises:
        ConfigError: shapes or choices that do not fit; names them.
        TypeError: a choice that there is not.
    """
    choices |= {"temperature": temperature, "beta": beta, "divergence": divergence}
    loss = MakeLoss(lambda_m, lambda_s, weights=weights, **choices)
    return loss.of_vectors(
        image_features, local_vectors, text_features, valid, logit_scale, labels=labels, similarity=similarity
    )


class MakeLoss(nn.Module):
    """The objective as a module: `lambda_m * mkcl + lambda_s * local`.

    Attributes:
        terms: of the last call, detached; None before the first.
    """

    def __init__(
        self,
        lambda_m: float = 1.0,
        lambda_s: float = 0.7,
        sigma: float = 0.0,
        weights: bool = True,
        **choices: Any,
    ) -> None:
        """Choose.

        Args:
            lambda_m: weight of the term over whole images.
            lambda_s: weight of the term over patches.
            sigma: least similarity of a patch with the raw caption that counts.
            weights: whether a sub-caption counts by its similarity to the ontology caption.
            choices: further fields of `MakeSettings`.

        Raises:
            ConfigError: a choice of a value that there is not.
            TypeError: a choice that there is not.
        """
        super().__init__()
        self.settings = MakeSettings(lambda_m=lambda_m, lambda_s=lambda_s, weights=weights, **choices)
        self.sigma = sigma
        self.terms: Terms | None = None

    def forward(
        self,
        image_features: Tensor,
        patch_features: Tensor,
        text_features: Tensor,
        valid: Tensor,
        logit_scale: Tensor | float,
        **graded: Any,
    ) -> Tensor:
        """The loss, a scalar; the same on every rank.

        Args:
            image_features: L2-normalised, `[B, D]`.
            patch_features: L2-normalised, `[B, P, D]`.
            text_features: L2-normalised, `[B, N, D]`.
            valid: `[B, N]`.
            logit_scale: exponentiated scale.
            graded: `labels`, `similarity` and `kinds` of `of_vectors`.

        Raises:
            ConfigError: as `objective`.
        """
        # The released code takes the first B rows of the flat list for the raw captions.
        released = self.settings.mode == "released"
        drivers = text_features.flatten(0, 1)[: len(text_features)] if released else text_features[:, 0]
        vectors = vectors_of_patches(patch_features, drivers, sigma=self.sigma)
        return self.of_vectors(image_features, vectors, text_features, valid, logit_scale, **graded).total

    def of_vectors(
        self,
        image_features: Tensor,
        local_vectors: Tensor,
        text_features: Tensor,
        valid: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor | None = None,
        similarity: Tensor | np.ndarray | None = None,
        kinds: Kinds | None = None,
    ) -> Terms:
        """As `objective`.

        Args:
            image_features: `[B, D]`.
            local_vectors: `[B, D]`.
            text_features: `[B, N, D]`.
            valid: `[B, N]`.
            logit_scale: exponentiated scale.
            labels: int64 `[B]`.
            similarity: `[C, C]`.
            kinds: what makes an image and another sample's text no negatives of each other.

        Raises:
            ConfigError: as `objective`; or soft targets where pairs are left out, which would be targets too.
        """
        self._check(image_features, local_vectors, text_features, valid)
        if labels is not None and labels.shape != (len(image_features),):
            raise ConfigError(f"MAKE's loss: needs labels [{len(image_features)}], got {list(labels.shape)}")
        if (labels is None) != (similarity is None):
            raise ConfigError("MAKE's loss: soft targets need both labels and similarity")
        with full_precision(image_features.device):
            image, text, scale = promoted(image_features, text_features, logit_scale)
            batch = _Batch(image * scale, local_vectors.to(image.dtype) * scale, text, valid.bool(), scale)
            soft = None
            if labels is not None and similarity is not None and self.settings.beta > 0:
                if kinds is not None:
                    raise ConfigError(
                        "MAKE's loss: soft targets already share a target out among samples of one diagnosis; "
                        "use them, or leave duplicates out, not both"
                    )
                graded = torch.as_tensor(similarity).to(image)
                soft = SoftTargets(labels, graded, temperature=self.settings.temperature, beta=self.settings.beta)
            terms = _terms(batch, self.settings, kinds, soft, counted(text, batch.valid, self.settings, labels))
        self.terms = terms.detached()
        return terms

    def _check(self, image: Tensor, local: Tensor, text: Tensor, valid: Tensor) -> None:
        if text.ndim != 3 or image.shape != (len(text), text.shape[2]) or local.shape != image.shape:
            raise ConfigError(
                "MAKE's loss: needs images [B, D], local vectors [B, D] and texts [B, N, D], "
                f"got {list(image.shape)}, {list(local.shape)} and {list(text.shape)}"
            )
        if valid.shape != text.shape[:2]:
            raise ConfigError(f"MAKE's loss: needs valid {list(text.shape[:2])}, got {list(valid.shape)}")
        if self.settings.mode == "released" and world()[1] > 1:
            raise ConfigError("MAKE's loss: mode=released is for one process; the released code fails on several")


@dataclass(frozen=True)
class Kinds:
    """Labels by which an image and a text of another sample are no negatives of each other.

    Attributes:
        samples: int64 `[B, K]`, K kinds of equality (same image, same diagnosis); comparable over ranks.
        texts: int64 `[B, N]`, equal for equal texts; a text that is one of the image's own is no negative of it.
    """

    samples: Tensor | None = None
    texts: Tensor | None = None

    def labels(self, texts_per_image: int) -> tuple[Tensor, Tensor] | None:
        """Those of images int64 `[B, K + N]`, and of texts, row by row `[B * N, K + N]`; None without any."""
        of_images, of_texts = [], []
        if self.samples is not None:
            of_images.append(self.samples.reshape(len(self.samples), -1))
            of_texts.append(of_images[0].repeat_interleave(texts_per_image, dim=0))
        if self.texts is not None:
            of_images.append(self.texts)
            of_texts.append(self.texts.reshape(-1, 1).expand(-1, texts_per_image))
        return (torch.cat(of_images, dim=1), torch.cat(of_texts, dim=1)) if of_images else None


@dataclass(frozen=True)
class _Batch:
    """Of a rank: images and local vectors times the scale `[n, D]`, texts `[n, N, D]`, bool `[n, N]`, the scale."""

    image: Tensor
    local: Tensor
    text: Tensor
    valid: Tensor
    scale: Tensor


def _terms(
    batch: _Batch, settings: MakeSettings, kinds: Kinds | None, soft: SoftTargets | None, weights: Counted
) -> Terms:
    num, texts_per_image, _ = batch.text.shape
    columns = all_gather(batch.text.flatten(0, 1))
    pairs = _pairs(batch.valid, settings, kinds)
    of_images, of_texts = log_normalisers(batch.image, columns, pairs, both=True)
    own = torch.einsum("bd,bnd->bn", batch.image, batch.text)
    per_image, per_text = of_images[:, None] - own, of_texts.view(num, texts_per_image) - own
    if soft is not None:
        columns_of = batch.valid if settings.negatives == "valid" else torch.ones_like(batch.valid)
        present = columns_of.to(own.dtype)
        texts = torch.einsum("bnd,bn->bd", batch.text, present)
        i2t = soft.means(batch.image[:, None], own, texts, present.sum(dim=1))
        t2i = soft.means(batch.text, own, batch.image, own.new_ones(num))
        # What the hard target took from the row, its soft part gives back in favour of the mean.
        per_image = per_image + settings.beta * (own - i2t.logits)
        per_text = per_text + settings.beta * (own - t2i.logits)
        if settings.divergence == "kl":
            per_image, per_text = per_image + i2t.negentropy, per_text + t2i.negentropy
    of_patches, _ = log_normalisers(batch.local, columns, pairs, both=False)
    per_patches = of_patches[:, None] - torch.einsum("bd,bnd->bn", batch.local, batch.text)
    i2t, t2i, local = _means(
        torch.stack([per_image, per_text, per_patches]), torch.stack([weights.i2t, weights.t2i, weights.local])
    )
    mkcl = (i2t + t2i) / 2
    return Terms(settings.lambda_m * mkcl + settings.lambda_s * local, mkcl, i2t, t2i, local)


def _pairs(valid: Tensor, settings: MakeSettings, kinds: Kinds | None) -> Pairs:
    bias = None
    if settings.negatives == "valid":
        bias = torch.zeros(valid.numel(), device=valid.device).masked_fill(~valid.flatten(), -torch.inf)
        bias = gather_rows(bias)
    labels = None if kinds is None else kinds.labels(valid.shape[1])
    rows, columns = (None, None) if labels is None else (labels[0], gather_rows(labels[1]))
    return Pairs(valid.shape[1], settings.tile_size, bias, rows, columns)


def _means(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted means over the global batch: scores and weights `[M, n, N]` → `[M]`; 0 where nothing has a weight."""
    totals = gather_rows(weights.sum(dim=(1, 2))[None]).sum(dim=0)
    shares = (scores * weights).sum(dim=(1, 2)) / totals.where(totals > 0, 1)
    return mean_over_ranks(world()[1] * shares)
