"""What held-out images say of an encoder while it learns: neighbours, a probe, how far its features have spread.

At most `validation.max_samples` samples of the split; each rank encodes its own part, then all have all features and
score the same. Of each class every second sample is scored, by the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn

from dermray import images
from dermray.errors import CorpusError, EvaluationError
from dermray.evaluate import knn, linear_probe
from dermray.evaluate.classes import class_targets
from dermray.ingest import augment, patch_masks
from dermray.losses.masked_latent import token_distances
from dermray.models import panderm_encoder
from dermray.models.cae import CaeV2, reordered
from dermray.models.image_encoders import ImageEncoder
from dermray.models.panderm_encoder import PanDermConfig
from dermray.train import numerics
from dermray.train.objectives.contrastive.validation import joined, of_all_ranks, part_of_rank
from dermray.train.objectives.masked_latent.settings import MaskedLatentConfig
from dermray.train.objectives.masked_latent.teachers import Teacher
from dermray.train.settings import PretrainConfig
from dermray.vectors.encoder import Encoder

NEIGHBOURS = 20
BATCH_SIZE = 64
# No modality is told where a corpus does not say it.
UNKNOWN = "unknown"


def validator_of(
    config: PretrainConfig, settings: MaskedLatentConfig, teacher: Teacher, described: PanDermConfig
) -> Callable[[nn.Module], dict[str, float]] | None:
    """What scores a run while it trains; None where it does not.

    Raises:
        DermRayError: the validation split cannot be read.
    """
    return Validator(config, settings, teacher, described) if config.validation.every_steps else None


class Validator:
    """Held-out samples, of which this rank keeps the images of its part as they are encoded.

    Made on every rank alike, inside the process group.
    """

    def __init__(
        self, config: PretrainConfig, settings: MaskedLatentConfig, teacher: Teacher, described: PanDermConfig
    ) -> None:
        self._config, self._settings, self._teacher = config, settings, teacher
        self._transform = panderm_encoder.transform_of(described)
        self._preprocessing = described.preprocessing()
        corpus, *others = config.corpus_uris
        self._samples, self._ends, self._modalities = joined([corpus, *others], config.validation)
        try:
            self._labels = class_targets(self._samples)[1]
        except EvaluationError:
            # None has a label: what is known of the images alone is told.
            self._labels = np.full(len(self._samples), -1)
        self._own = list(range(len(self._samples))[part_of_rank(len(self._samples))])
        self._images: list[bytes] | None = None
        randoms = [augment.generator(config.seed, 0, index) for index in self._own]
        self._masks = patch_masks.masks(settings.mask, randoms, settings.grid, settings.num_masked)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Scores under the keys `validation_…`, the same on every rank; leaves the model in training mode.

        Args:
            model: the plain module that is being trained.

        Raises:
            CorpusError: an image of this rank's part is damaged.
        """
        assert isinstance(model, CaeV2)
        if self._images is None:
            by_index = self._samples.read_images(self._own)
            self._images = [by_index[index] for index in self._own]
        device = model.mask_token.device
        tower = ImageEncoder(
            model.encoder, _first_token, sides=(self._settings.image_size,) * 2, preprocessing=self._preprocessing
        )
        encoder = Encoder(
            tower, self._transform, None, name="validation", model_digest="in training", device=str(device)
        )
        model.eval()
        try:
            features, reasons = encoder.encode_readable(self._images, normalise=True)
            self._refuse_damaged(reasons)
            cosines = self._cosines(model, encoder)
        finally:
            model.train()
            getattr(self._teacher, "forget", lambda: None)()
        count = len(self._samples)
        scores = of_features(of_all_ranks(features, count, device), self._labels)
        of_images = of_all_ranks(cosines[:, None], count, device)[:, 0]
        scores |= {"masked_cosine": float(of_images.mean()), **by_modality(of_images, self._modalities)}
        return {f"validation_{key}": value for key, value in scores.items()}

    def _refuse_damaged(self, reasons: np.ndarray) -> None:
        for place in np.flatnonzero(reasons):
            index = self._own[place]
            uri = next(uri for uri, end in self._ends.items() if index < end)
            raise CorpusError(
                f"{uri}: the image of sample {self._samples.ids[index]} is damaged ({reasons[place]}); prepare the "
                "corpus again"
            )

    @torch.no_grad()
    def _cosines(self, model: CaeV2, encoder: Encoder) -> np.ndarray:
        """How well the masked patches of this rank's images are predicted: mean cosine of each image, float32 `[n]`."""
        device, found = model.mask_token.device, [np.zeros(0, np.float32)]
        assert self._images is not None
        for start in range(0, len(self._images), BATCH_SIZE):
            part = self._images[start : start + BATCH_SIZE]
            pixels = torch.from_numpy(np.stack([encoder.preprocess(data) for data in part])).to(device)
            levels = torch.from_numpy(np.stack([self._levels(data) for data in part])).to(device)
            mask = torch.from_numpy(self._masks[start : start + BATCH_SIZE]).to(device)
            with numerics.autocast(self._config.train, device):
                target = reordered(self._teacher(levels.permute(0, 3, 1, 2).float()), mask)
                prediction = model(pixels, mask, num_masked=self._settings.num_masked)
            hidden = 1 - token_distances(prediction, target)[:, -self._settings.num_masked :]
            found.append(hidden.mean(dim=1).float().cpu().numpy())
        return np.concatenate(found)

    def _levels(self, data: bytes) -> np.ndarray:
        """The middle of an image as the teacher takes it, uint8 `[T, T, 3]`."""
        size = self._teacher.size or self._settings.image_size
        picture = Image.fromarray(images.decode(data, enlarged_side=size))
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        by = Image.Resampling.BICUBIC if self._teacher.size is None else Image.Resampling.LANCZOS
        return np.asarray(picture.resize((size, size), by, box=box))


def _first_token(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def of_features(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of unit vectors `[N, D]` and the class of each, int64 `[N]`, below 0 without one.

    `effective_rank` is the exponential of the entropy of the singular values of centred features (Roy and Vetterli,
    2007); `spread` their mean squared distance from their mean: 0 where all are the same, 1 where they lie all around.
    """
    centred = features - features.mean(axis=0)
    values = np.linalg.svd(centred.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
    scores = {
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "spread": float(np.square(centred).sum(axis=1).mean()),
    }
    fitted, scored = halves(labels)
    if len(np.unique(labels[fitted])) < 2 or not len(scored):
        return scores
    names, classes = np.unique(labels[fitted], return_inverse=True)
    truth = np.searchsorted(names, labels[scored])
    votes = knn.vote(features[scored], features[fitted], classes, len(names), k=NEIGHBOURS)
    probe = linear_probe.fit(features[fitted], classes)
    for name, probabilities in (("knn", votes), ("linear_probe", probe.predict_proba(features[scored]))):
        scores[f"{name}_accuracy"] = float((probabilities.argmax(axis=1) == truth).mean())
    return scores


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each class that has two samples or more every second one: positions to fit on, and to score.

    `[0, 1, 0, -1, 0]` → `[0, 4]`, `[2]`.
    """
    fitted, scored = [], []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            fitted.append(members[::2])
            scored.append(members[1::2])
    empty = [np.zeros(0, dtype=np.int64)]
    return np.sort(np.concatenate(fitted or empty)), np.sort(np.concatenate(scored or empty))


def by_modality(cosines: np.ndarray, modalities: list[str | None]) -> dict[str, float]:
    """The mean cosine of each kind of picture that the corpora tell: `masked_cosine_dermoscopic`; none for one kind."""
    named = np.array([each or UNKNOWN for each in modalities])
    kinds = [each for each in np.unique(named).tolist() if each != UNKNOWN]
    return {f"masked_cosine_{kind.replace('-', '_')}": float(cosines[named == kind].mean()) for kind in kinds}
