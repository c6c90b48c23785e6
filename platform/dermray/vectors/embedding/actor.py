"""The worker of batch inference: an encoder in an actor that turns a part's images or texts into the part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dermray.errors import EvaluationError, ModelError
from dermray.vectors.embedding import store
from dermray.vectors.embedding.store import Part
from dermray.vectors.embedding.units import Images
from dermray.vectors.encoder_info import EncoderInfo, Precision

if TYPE_CHECKING:
    from dermray.vectors.encoder import Encoder


@dataclass(frozen=True)
class Work:
    """A part to be made, and what it is made of: images, or texts in the order of the part's keys."""

    part: Part
    source: Images | tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Images or texts in it."""
        return len(self.source) if isinstance(self.source, tuple) else self.source.num_rows


class EncodeActor:
    """Makes parts with an `Encoder`, loaded with the first of them: until then it is small enough to travel."""

    def __init__(self, model_uri: str, precision: Precision, batch_size: int, info: EncoderInfo) -> None:
        """Remember the model, which must be the one of `info`. `batch_size` images or texts go through at a time."""
        self._model_uri: str = model_uri
        self._precision: Precision = precision
        self._encoder: Encoder | None = None
        self._batch_size = batch_size
        self._info = info

    def __call__(self, work: Work) -> None:
        """Make a part.

        Raises:
            ModelError: the model cannot be loaded, or its folder changed.
            CorpusError: a shard cannot be read.
            EvaluationError: the model's vectors are not finite.
            StorageError: the part cannot be written.
        """
        self._encoder = self._encoder or self._loaded()
        if self._encoder.info != self._info:
            raise ModelError("the model's folder changed while it was at work; run again")
        if isinstance(work.source, tuple):
            vectors = self._encoder.encode_texts(work.source, batch_size=self._batch_size)
            words = [store.key_of(text) for text in work.source]
        else:
            vectors, reasons = self._encoder.encode_readable(work.source.read(), batch_size=self._batch_size)
            words = reasons.tolist()
        if not np.isfinite(vectors).all():
            raise EvaluationError("the model gives vectors that are not finite; its weights are damaged or diverged")
        store.write(work.part, vectors, words)

    def _loaded(self) -> Encoder:
        from dermray.vectors.encoder import Encoder

        return Encoder.load(self._model_uri, precision=self._precision)
