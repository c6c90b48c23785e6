"""MLflow's `python_function` flavour of a model folder: `mlflow.pyfunc.load_model(URI).predict(table)`.

The folder keeps open_clip's layout; MLflow's files (`MLmodel`, `requirements.txt`, `input_example.json`, …) lie beside.
No pickle: MLflow calls `_load_pyfunc` of this module, which opens the folder with `dermray.encoder`. The environment
that loads it needs DermRay itself installed.
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
from mlflow.types.schema import Array
from PIL import Image

from dermray import __version__
from dermray.errors import DermRayError, ModelError
from dermray.serving import locate

IMAGE, TEXT = "image", "text"
# Where the model folder is, when it is not beside `MLmodel`.
FOLDER_KEY = "folder"
MAX_ROWS = 4096
EXAMPLE_SIDE = 64

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, IMAGE, required=False), ColSpec(DataType.string, TEXT, required=False)]),
    outputs=Schema(
        [
            ColSpec(Array(DataType.double), "embedding"),
            ColSpec(DataType.string, "label", required=False),
            ColSpec(DataType.double, "probability", required=False),
            ColSpec(Array(DataType.double), "probabilities", required=False),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("labels", DataType.string, [], shape=(-1,)),
            ParamSpec("classify", DataType.boolean, False),
        ]
    ),
)


class DermRayModel:
    """What `mlflow.pyfunc` wraps: rows of image bytes or texts in, vectors and (for images) classes out."""

    def __init__(self, folder: str) -> None:
        """Load the model folder `folder`.

        Raises:
            ModelError: it holds no model.
        """
        from dermray.encoder import Encoder

        self._encoder = Encoder.load(folder)
        self._classes = locate(folder).classes

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Embed every row, and classify images where it is asked for.

        Args:
            model_input: a column `image` (encoded bytes) or `text`; in each row exactly one of them is given.
            params: `labels` (class names to rank; classifies) and `classify` (rank the model's own classes).

        Returns:
            `embedding` (unit vector, D floats); with classes also `label`, `probability` and `probabilities`, in the
            order of the classes; empty for texts.

        Raises:
            DermRayError: a row has neither or both, bytes that are no image, or there are no classes to rank.
        """
        given = dict(params or {})
        images, texts = _rows(model_input)
        vectors = self._vectors(images, texts)
        answer = pd.DataFrame({"embedding": [vector.astype(float).tolist() for vector in vectors]})
        labels = tuple(map(str, np.ravel(given.get("labels", []))))
        if labels or given.get("classify"):
            self._classify(answer, vectors, images, labels or self._classes)
        return answer

    def _vectors(self, images: list[bytes | None], texts: list[str | None]) -> np.ndarray:
        vectors = np.zeros((len(images), self._encoder.info.embedding_dim), dtype=np.float32)
        are_images = np.array([image is not None for image in images], dtype=bool)
        vectors[are_images] = self._encoder.encode_images([image for image in images if image is not None])
        vectors[~are_images] = self._encoder.encode_texts([text for text in texts if text is not None])
        return vectors

    def _classify(
        self, answer: pd.DataFrame, vectors: np.ndarray, images: list[bytes | None], labels: tuple[str, ...]
    ) -> None:
        from dermray.evaluate.zero_shot import build_classifier
        from dermray.serving.classifier import rank

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
def files(folder_uri: str | None, metadata: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder with MLflow's own files of the flavour, to be put beside the model's.

    Args:
        folder_uri: of a model that stays where it is; None when its files will lie beside these.
        metadata: facts for `MLmodel`: digests, licence, classes.
    """
    # It says that it checks the example.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="dermray-flavour-") as parent:
        path = Path(parent) / "model"
        mlflow.pyfunc.save_model(
            path=str(path),
            loader_module=__name__,
            signature=SIGNATURE,
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
