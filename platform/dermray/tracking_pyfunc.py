"""The same model as an `mlflow.pyfunc` flavour, for people who serve by MLflow.

`save(folder, path)` writes an MLflow model around a model folder; the code that answers is this file ("models from
code"), so nothing is pickled. Input: a data frame with a column `input`, each an image as bytes or data URI, or a text.
Output: a column `embedding`, and with the parameter `labels` a column `ranking` for images.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from dermray.encoder import Encoder
from dermray.errors import ImageError, ModelError
from dermray.evaluate.zero_shot import build_classifier
from dermray.serving import rank

ARTIFACT = "model"
_IMAGE_PREFIX = "data:image/"


def save(folder: str | PathLike[str], path: str | PathLike[str]) -> None:
    """Write an MLflow model of the pyfunc flavour to a local folder.

    Args:
        folder: a model folder (`open_clip_config.json`, `open_clip_model.safetensors`).
        path: where to; it must not exist or be empty.
    """
    mlflow.pyfunc.save_model(
        path=str(path),
        python_model=str(Path(__file__).resolve()),
        artifacts={ARTIFACT: str(folder)},
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "input")]),
            params=ParamSchema([ParamSpec("labels", DataType.string, "")]),
        ),
        pip_requirements=["dermray"],
    )


class EncoderModel(mlflow.pyfunc.PythonModel):
    """`Encoder` behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was saved with it."""
        self._encoder = Encoder.load(context.artifacts[ARTIFACT])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Embed every row; with `labels` (a JSON list, or commas) also rank them for every image.

        Raises:
            ModelError: no column `input`, or a row that is no usable image; it names the row.
        """
        if "input" not in model_input:
            raise ModelError(f"the data frame has no column 'input', it has {list(model_input.columns)}")
        images = [_image_of(value, row) for row, value in enumerate(model_input["input"])]
        vectors = [
            self._embed(image, value, row)
            for row, (image, value) in enumerate(zip(images, model_input["input"], strict=True))
        ]
        columns: dict[str, list[Any]] = {"embedding": [vector.tolist() for vector in vectors]}
        labels = _labels_of((params or {}).get("labels") or "")
        if labels:
            weights = build_classifier(self._encoder, labels)
            columns["ranking"] = [
                self._rank(vector, weights, labels) if image is not None else None
                for vector, image in zip(vectors, images, strict=True)
            ]
        return pd.DataFrame(columns)

    def _embed(self, image: bytes | None, value: Any, row: int) -> np.ndarray:
        if image is None:
            return self._encoder.encode_texts([str(value)])[0]
        try:
            return self._encoder.encode_images([image])[0]
        except ImageError as error:
            raise ModelError(f"row {row}: {error}") from None

    def _rank(self, vector: np.ndarray, weights: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        ranking = rank(vector, weights, labels, self._encoder.logit_scale)
        return [{"label": one.label, "probability": one.probability} for one in ranking]


def _image_of(value: Any, row: int) -> bytes | None:
    """The bytes of an image; None for a text."""
    if isinstance(value, bytes):
        return value
    if not str(value).lower().startswith(_IMAGE_PREFIX):
        return None
    try:
        return base64.b64decode(str(value).partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise ModelError(f"row {row}: what follows base64, is not valid base64") from None


def _labels_of(text: str) -> list[str]:
    values = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    return [str(value).strip() for value in values if str(value).strip()]


# MLflow runs this file as a script of its own and takes what is set here; importing it as a module sets nothing.
if not __name__.startswith("dermray."):
    set_model(EncoderModel())
