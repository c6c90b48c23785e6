"""Zero-shot accuracy and retrieval on held-out samples while training goes on.

At most `validation.max_samples` samples of the split, of several corpora as many of each, go through the very `Encoder`
and metrics that evaluation uses. Each rank encodes its own part of images, texts and classes; then all have all
vectors, and score the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import MODALITY
from dermray.errors import CorpusError
from dermray.evaluate.classes import class_targets
from dermray.evaluate.retrieval import retrieval_metrics
from dermray.evaluate.samples import Samples
from dermray.ingest.corpora import Corpora
from dermray.losses.gather import gather_rows, world
from dermray.models.factory import ImageTransform, Tokenizer
from dermray.predict import zero_shot
from dermray.train.objectives.contrastive import RETRIEVAL_KS
from dermray.train.settings import PretrainConfig, ValidationConfig
from dermray.vectors.encoder import Encoder


def validator_of(config: PretrainConfig, image_transform: ImageTransform, tokenizer: Tokenizer) -> Validator | None:
    """What scores a run while it trains; None where it does not.

    Args:
        config: of the run.
        image_transform, tokenizer: of the model.

    Raises:
        DermRayError: the validation split cannot be read.
    """
    if not config.validation.every_steps:
        return None
    corpus, *others = config.corpus_uris
    return Validator(corpus, config.validation, image_transform, tokenizer, others=others)


class Validator:
    """Held-out samples, of which this rank keeps the images of its part as they are encoded.

    Made on every rank alike, inside the process group.

    Args:
        corpus: its URI.
        others: URIs of further corpora, whose split is joined with that of the first.
    """

    def __init__(
        self,
        corpus: str,
        settings: ValidationConfig,
        image_transform: ImageTransform,
        tokenizer: Tokenizer,
        *,
        others: Sequence[str] = (),
    ) -> None:
        self._image_transform = image_transform
        self._tokenizer = tokenizer
        self._samples, self._ends, _ = joined([corpus, *others], settings)
        self._class_names, self._labels = class_targets(self._samples)
        self._encoded: list[bytes] | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Scores under the keys `validation_…`, the same on every rank; leaves the model in training mode.

        Args:
            model: the plain module that is being trained.

        Raises:
            CorpusError: an image of this rank's part is damaged.
        """
        device = next(model.parameters()).device
        encoder = Encoder(
            model, self._image_transform, self._tokenizer, name="validation", model_digest="", device=str(device)
        )
        try:
            return {f"validation_{key}": value for key, value in self._score(encoder, device).items()}
        finally:
            model.train()

    def _score(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        image_features = of_all_ranks(self._image_features(encoder), len(self._samples), device)
        scores: dict[str, float] = {}
        labelled = np.flatnonzero(self._labels >= 0)
        if len(labelled):
            names = self._class_names[part_of_rank(len(self._class_names))]
            own = zero_shot.build_classifier(encoder, names) if names else np.zeros_like(image_features[:0])
            classifier = torch.from_numpy(of_all_ranks(own, len(self._class_names), device))
            predicted = zero_shot.probabilities(torch.from_numpy(image_features[labelled]), classifier).argmax(1)
            scores["zero_shot_accuracy"] = float((predicted.numpy() == self._labels[labelled]).mean())
        captions = {index: text for index, text in enumerate(self._samples.captions) if text is not None}
        if not captions:
            return scores
        # Equal texts are one: two ranks might not give them the same last bit, and ties are scored as such.
        texts = {text: place for place, text in enumerate(dict.fromkeys(captions.values()))}
        vectors = of_all_ranks(encoder.encode_texts(list(texts)[part_of_rank(len(texts))]), len(texts), device)
        of_captions = vectors[[texts[text] for text in captions.values()]]
        retrieval = retrieval_metrics(image_features[list(captions)], of_captions, ks=RETRIEVAL_KS)
        return scores | {key.replace("@", "_at_"): value for key, value in retrieval.items() if "R@" in key}

    def _image_features(self, encoder: Encoder) -> np.ndarray:
        """Of this rank's part, float32 `[n, D]`."""
        own = range(len(self._samples))[part_of_rank(len(self._samples))]
        if self._encoded is None:
            by_index = self._samples.read_images(list(own))
            self._encoded = [by_index[index] for index in own]
        features, reasons = encoder.encode_readable(self._encoded, normalise=True)
        for place in np.flatnonzero(reasons):
            uri = next(uri for uri, end in self._ends.items() if own[place] < end)
            raise CorpusError(
                f"{uri}: the image of sample {self._samples.ids[own[place]]} is damaged "
                f"({reasons[place]}); prepare the corpus again"
            )
        return features


def joined(uris: Sequence[str], settings: ValidationConfig) -> tuple[Samples, dict[str, int], list[str | None]]:
    """The first samples of every corpus's split, where those of each end, and what kind of picture each one is.

    A corpus with fewer gives what it has.
    """
    shares = [max(1, (settings.max_samples + place) // len(uris)) for place in reversed(range(len(uris)))]
    parts = [Samples.load(uri, settings.split, max_samples=share) for uri, share in zip(uris, shares, strict=True)]
    together, ends = parts[0], {parts[0].uri: len(parts[0])}
    for part in parts[1:]:
        together = together.followed_by(part)
        ends[part.uri] = len(together)
    corpora = Corpora.load(uris)
    if len(uris) > 1 and not (corpora.one_tree and corpora.manifests[0].ontology_sha256):
        flat = Ontology.flat(label for labels in together.labels for label in labels)
        together = replace(together, ontology=flat)
    kinds = [kind for part in parts for kind in part.groups.get(MODALITY.name, [None] * len(part))]
    return together, ends, kinds


def part_of_rank(count: int) -> slice:
    """This rank's share of `count` things in a row: of 10 over 4 ranks 0 to 2, 3 to 5, 6 to 8, and 9 alone."""
    rank, world_size = world()
    size = -(-count // world_size)
    return slice(rank * size, (rank + 1) * size)


def of_all_ranks(own: np.ndarray, count: int, device: torch.device) -> np.ndarray:
    """The rows of every rank's `part_of_rank` in their order: float32 `[n, D]` → `[count, D]`."""
    rows = torch.zeros(-(-count // world()[1]), own.shape[1], device=device)
    rows[: len(own)] = torch.from_numpy(own)
    return gather_rows(rows).cpu().numpy()[:count]
