"""The worker of batch inference: an encoder in an actor that turns a part's images or texts into the part."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dermray import errors
from dermray.embedding import store
from dermray.embedding.store import Part
from dermray.embedding.units import from_document
from dermray.encoder import Encoder, EncoderInfo, Precision
from dermray.errors import DermRayError, EvaluationError, ModelError

Batch = dict[str, np.ndarray]


class EncodeActor:
    """A Ray Data actor around `Encoder`: one item of work in, its part written, one row of what was done out.

    An error of ours travels as a row: Ray keeps only the text of an exception, and restarts an actor whose
    constructor raises, however hopeless.
    """

    def __init__(self, model_uri: str, precision: Precision, batch_size: int, info: dict[str, Any]) -> None:
        """Remember the model; it is loaded with the first item. `batch_size` images or texts go through at a time."""
        self._load = lambda: Encoder.load(model_uri, precision=precision)
        self._encoder: Encoder | None = None
        self._batch_size = batch_size
        self._info = EncoderInfo(**info)

    def __call__(self, batch: Batch) -> Batch:
        """One item (a batch of one row) to one row: images and texts done, error."""
        item = json.loads(str(batch["item"][0]))
        num_images = num_texts = 0
        error = ""
        try:
            self._encoder = self._encoder or self._load()
            if self._encoder.info != self._info:
                raise ModelError("the model's folder changed while it was at work; run again")
            num_rows = self._encode(self._encoder, item)
            num_images, num_texts = (0, num_rows) if "texts" in item else (num_rows, 0)
        except DermRayError as failure:
            error = described(failure)
        return {
            "num_images": np.array([num_images]),
            "num_texts": np.array([num_texts]),
            "error": np.array([error], dtype=object),
        }

    def _encode(self, encoder: Encoder, item: dict[str, Any]) -> int:
        if "texts" in item:
            vectors = encoder.encode_texts(item["texts"], batch_size=self._batch_size)
            words = [store.key_of(text) for text in item["texts"]]
        else:
            images = from_document(item["images"]).read()
            vectors, reasons = encoder.encode_readable(images, batch_size=self._batch_size)
            words = reasons.tolist()
        if not np.isfinite(vectors).all():
            raise EvaluationError("the model gives vectors that are not finite; its weights are damaged or diverged")
        store.write(Part(**item["part"]), vectors, words)
        return len(vectors)


def described(error: DermRayError) -> str:
    """An error of ours as the text of a row, for `error_of`."""
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def error_of(text: str) -> DermRayError:
    """The error that a row tells of."""
    document = json.loads(text)
    return getattr(errors, document["kind"])(document["message"])
