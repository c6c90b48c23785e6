"""MLflow's `python_function` flavour of a model folder: `mlflow.pyfunc.load_model(URI).predict(table)`.

The folder keeps the layout of its kind; MLflow's files (`MLmodel`, `requirements.txt`, `input_example.json`, …) lie
beside. No pickle: MLflow calls `_load_pyfunc` of this module, which opens the folder with `dermray.vectors.encoder`.
The environment that loads it needs DermRay itself installed.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array
from PIL import Image

from dermray import __version__
from dermray.errors import DermRayError, ModelError
from dermray.models.kinds import IN_WORDS, Answer
from dermray.predict import locate

IMAGE, TEXT, PREDICTION = "image", "text", "prediction"
# Where the model folder is, when it is not beside `MLmodel`.
FOLDER_KEY = "folder"
MAX_ROWS = 4096
EXAMPLE_SIDE = 64


def signature(answers: frozenset[Answer]) -> ModelSignature:
    """What a model takes and gives that answers so."""
    inputs = [ColSpec(DataType.binary, IMAGE, required=False)]
    outputs = [ColSpec(DataType.string, "error", required=False)]
    if answers & {"images", "texts"}:
        outputs.insert(0, ColSpec(Array(DataType.double), "embedding", required=False))
    if "predictions" in answers:
        outputs.append(ColSpec(AnyType(), PREDICTION, required=False))
    if "texts" not in answers:
        return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))
    inputs.append(ColSpec(DataType.string, TEXT, required=False))
    outputs += [
        ColSpec(DataType.string, "label", required=False),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(Array(DataType.double), "probabilities", required=False),
    ]
    params = [ParamSpec("labels", DataType.string, [], shape=(-1,)), ParamSpec("classify", DataType.boolean, False)]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs), params=ParamSchema(params))


class DermRayModel:
    """What `mlflow.pyfunc` wraps: rows of image bytes or texts in, vectors and what its kind says of images out."""

    def __init__(self, folder: str) -> None:
        """Load the model folder `folder`.

        Raises:
            ModelError: it holds no model.
        """
        from dermray.vectors.encoder import Encoder

        self._encoder = Encoder.load(folder)
        self._classes = locate(folder).classes

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Embed every row, predict where the model's kind does, and classify images where it is asked for.

        Args:
            model_input: a column `image` (encoded bytes) or `text`; in each row exactly one of them is given.
            params: `labels` (class names to rank; classifies) and `classify` (rank the model's own classes).

        Returns:
            `embedding` (unit vector, D floats) and `error`: in the row of an image that cannot be read its reason, as
            `ImageError` has it, and None for the vector. With classes also `label`, `probability` and `probabilities`,
            in the order of the classes; empty for texts and for what has an error. Of a kind that predicts also
            `prediction`: of each image lists of numbers by name; of a kind without vectors no `embedding`.

        Raises:
            DermRayError: a row has neither or both, or there are no classes to rank.
            ModelError: texts, or classes to rank, of a model whose kind takes no texts.
        """
        given = dict(params or {})
        images, texts = _rows(model_input)
        labels = tuple(map(str, np.ravel(given.get("labels", []))))
        classifies = bool(labels or given.get("classify"))
        if "texts" not in self._encoder.answers and (classifies or any(text is not None for text in texts)):
            can = ", ".join(IN_WORDS[one] for one in IN_WORDS if one in self._encoder.answers)
            raise ModelError(f"{self._encoder.info.name} takes no texts and ranks no classes; it gives {can}")
        vectors, reasons = self._vectors(images, texts)
        answer = pd.DataFrame({"error": [why or None for why in reasons]}, dtype=object)
        if self._encoder.answers & {"images", "texts"}:
            embeddings = [
                None if why else vector.astype(float).tolist() for vector, why in zip(vectors, reasons, strict=True)
            ]
            answer.insert(0, "embedding", pd.Series(embeddings, dtype=object))
        if "predictions" in self._encoder.answers:
            predicted, reasons = self._predictions(images)
            answer["error"] = pd.Series([why or None for why in reasons], dtype=object)
            answer[PREDICTION] = pd.Series(predicted, dtype=object)
        if classifies:
            readable = [None if why else image for image, why in zip(images, reasons, strict=True)]
            self._classify(answer, vectors, readable, labels or self._classes)
        return answer

    def _vectors(self, images: list[bytes | None], texts: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors, float32 `[N, D]`, and why an image has none, object `[N]`: a reason, or empty."""
        vectors = np.zeros((len(images), self._encoder.info.embedding_dim), dtype=np.float32)
        reasons = np.full(len(images), "", dtype=object)
        if "images" in self._encoder.answers:
            are_images = np.array([image is not None for image in images], dtype=bool)
            given = [image for image in images if image is not None]
            vectors[are_images], reasons[are_images] = self._encoder.encode_readable(given, normalise=True)
            vectors[~are_images] = self._encoder.encode_texts([text for text in texts if text is not None])
        return vectors, reasons

    def _predictions(self, images: list[bytes | None]) -> tuple[list[dict[str, Any] | None], np.ndarray]:
        """Lists of numbers by name of each image, and why one has none, object `[N]`: a reason, or empty."""
        predicted: list[dict[str, Any] | None] = [None] * len(images)
        reasons = np.full(len(images), "", dtype=object)
        rows = [row for row, image in enumerate(images) if image is not None]
        found, why = self._encoder.predict_readable([images[row] for row in rows])
        for row, one, reason in zip(rows, found, why, strict=True):
            predicted[row] = None if one is None else {name: values.tolist() for name, values in one.items()}
            reasons[row] = reason
        return predicted, reasons

    def _classify(
        self, answer: pd.DataFrame, vectors: np.ndarray, images: list[bytes | None], labels: tuple[str, ...]
    ) -> None:
        from dermray.predict.classifier import rank
        from dermray.predict.zero_shot import build_classifier

        if not labels:
            raise ModelError("the model names no classes of its own; give params labels=[...]")
        weights = build_classifier(self._encoder, labels)
        rankings = [
            None if image is None else rank(vector, weights, labels, self._encoder.logit_scale)
            for image, vector in zip(images, vectors, strict=True)
        ]
        answer["label"] = [None if ranking is None else ranking[0].label for ranking in rankings]
        answer["probability"] = [np.nan if ranking is None else ranking[0].probability for ranking in rankings]
        answer["probabilities"] = [
            [] if ranking is None else [{one.label: one.probability for one in ranking}[label] for label in labels]
            for ranking in rankings
        ]


def _rows(table: pd.DataFrame) -> tuple[list[bytes | None], list[str | None]]:
    if len(table) > MAX_ROWS:
        raise DermRayError(f"{len(table):,} rows at once; give at most {MAX_ROWS:,}, in several calls")
    columns = {name: table[name].tolist() if name in table else [None] * len(table) for name in (IMAGE, TEXT)}
    images = [bytes(value) if isinstance(value, bytes | bytearray) else None for value in columns[IMAGE]]
    texts = [value if isinstance(value, str) else None for value in columns[TEXT]]
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise DermRayError(f"row {number}: give either {IMAGE} (encoded bytes) or {TEXT}")
    return images, texts


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> DermRayModel:
    """Called by MLflow with the folder that holds `MLmodel`."""
    return DermRayModel((model_config or {}).get(FOLDER_KEY) or path)


@contextmanager
def files(folder_uri: str | None, metadata: Mapping[str, Any], answers: frozenset[Answer]) -> Iterator[Path]:
    """A temporary folder with MLflow's own files of the flavour, to be put beside the model's.

    Args:
        folder_uri: of a model that stays where it is; None when its files will lie beside these.
        metadata: facts for `MLmodel`: digests, licence, classes.
        answers: of the model's kind.
    """
    # It says that it checks the example.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="dermray-flavour-") as parent:
        path = Path(parent) / "model"
        mlflow.pyfunc.save_model(
            path=str(path),
            loader_module=__name__,
            signature=signature(answers),
            input_example=_example(),
            pip_requirements=[f"dermray=={__version__}"],
            model_config={} if folder_uri is None else {FOLDER_KEY: folder_uri},
            metadata=dict(metadata),
        )
        yield path


def _example() -> pd.DataFrame:
    """One image: a brown disc on a lighter ground."""
    y, x = np.mgrid[:EXAMPLE_SIDE, :EXAMPLE_SIDE] - EXAMPLE_SIDE / 2
    disc = (x**2 + y**2 < (EXAMPLE_SIDE / 4) ** 2)[..., None]
    pixels = np.where(disc, (110, 70, 50), (224, 184, 160)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pd.DataFrame({IMAGE: [buffer.getvalue()]})
