"""Zero-shot accuracy and retrieval on held-out samples while training goes on.

Rank 0 scores at most `validation.max_samples` samples of the split through the very `Encoder` and metrics that
evaluation uses; the other ranks wait at their next collective.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dermray.encoder import Encoder
from dermray.evaluate import zero_shot
from dermray.evaluate.retrieval import retrieval_metrics
from dermray.evaluate.samples import Samples
from dermray.models.factory import ImageTransform, Tokenizer
from dermray.train.settings import ValidationConfig

RETRIEVAL_KS = (1, 5, 10)


class Validator:
    """Held-out samples, decoded once and kept as the model's input."""

    def __init__(
        self, corpus: str, settings: ValidationConfig, image_transform: ImageTransform, tokenizer: Tokenizer
    ) -> None:
        self._image_transform = image_transform
        self._tokenizer = tokenizer
        self._samples = Samples.load(corpus, settings.split, max_samples=settings.max_samples)
        self._class_names, self._labels = zero_shot.class_targets(self._samples)
        self._encoded: list[bytes] | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Scores under the keys `validation_…`; leaves the model in training mode.

        Args:
            model: the plain module that is being trained.
        """
        device = next(model.parameters()).device
        encoder = Encoder(
            model, self._image_transform, self._tokenizer, name="validation", model_digest="", device=str(device)
        )
        try:
            return {f"validation_{key}": value for key, value in self._score(encoder).items()}
        finally:
            model.train()

    def _score(self, encoder: Encoder) -> dict[str, float]:
        if self._encoded is None:
            by_index = self._samples.read_images(list(range(len(self._samples))))
            self._encoded = [by_index[index] for index in range(len(self._samples))]
        image_features = encoder.encode_images(self._encoded)
        scores: dict[str, float] = {}
        labelled = np.flatnonzero(self._labels >= 0)
        if len(labelled):
            classifier = torch.from_numpy(zero_shot.build_classifier(encoder, self._class_names))
            predicted = zero_shot.probabilities(torch.from_numpy(image_features[labelled]), classifier).argmax(1)
            scores["zero_shot_accuracy"] = float((predicted.numpy() == self._labels[labelled]).mean())
        captioned = [index for index, text in enumerate(self._samples.captions) if text is not None]
        text_features = encoder.encode_texts([self._samples.captions[index] or "" for index in captioned])
        retrieval = retrieval_metrics(image_features[captioned], text_features, ks=RETRIEVAL_KS)
        return scores | {key.replace("@", "_at_"): value for key, value in retrieval.items() if "R@" in key}
