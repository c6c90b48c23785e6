"""Which kinds of models there are and what each can answer; everything that meets a model folder asks here.

A folder names its kind in `dermray.json`; without that it is `clip`, or `image_encoder` where timm or transformers
saved it or it holds a PanDerm encoder. A kind of one's own is an entry point of the group `dermray.kinds` of an
installed package that leads to a `ModelKind`. An import path is none: a folder that somebody sends must not choose what
code is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dermray import extensions, storage
from dermray.errors import ModelError
from dermray.model_uri import folder_uri
from dermray.models import layout

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "dermray.kinds"
# Unit vectors of images, unit vectors of texts in the same space, and named arrays that are the model's own.
Answer = Literal["images", "texts", "predictions"]
IN_WORDS: dict[Answer, str] = {
    "images": "vectors of images",
    "texts": "vectors of texts",
    "predictions": "predictions of its own",
}


@dataclass(frozen=True)
class ModelKind:
    """What models of a kind have in common.

    Attributes:
        module: with `load(path: Path) → (model, image_transform, tokenizer)`, from a local folder; on the CPU, in
            float32, in evaluation mode. PIL image → float32 `[3, S, S]`, N texts → int64 `[N, L]` or None. The model is
            open_clip's or a `dermray.models.image_encoders.ImageEncoder`, and has what `answers` says: `encode_image`,
            `encode_text`, and `predict`: float32 `[N, 3, S, S]` → tensors by name, each with N rows.
        answers: what such a model can be asked. Golden vectors are these answers to drawn images and a few texts.
        metric: `TASK.METRIC` that the registry compares by unless a run says otherwise.
    """

    module: str
    answers: frozenset[Answer]
    metric: str

    def load(self, path: Path) -> tuple[nn.Module, Callable[[Any], Any], Callable[[list[str]], Any] | None]:
        """The model in a local folder, its image transform and its tokeniser.

        Raises:
            ModelError: files are missing or do not fit.
        """
        return importlib.import_module(self.module).load(path)


OURS = {
    layout.CLIP: ModelKind("dermray.models.factory", frozenset({"images", "texts"}), "zero_shot.accuracy"),
    layout.IMAGE_ENCODER: ModelKind("dermray.models.image_encoders", frozenset({"images"}), "linear_probe.accuracy"),
}


def of(name_or_uri: str) -> ModelKind:
    """The kind of a model folder; architectures and models of a hub are `clip`.

    Raises:
        ModelError: the folder names a kind that is not known here; names both.
    """
    uri = folder_uri(name_or_uri)
    return OURS[layout.CLIP] if uri is None else find(layout.kind_of(uri), uri)


def find(kind: str, folder: str) -> ModelKind:
    """The kind of this name, which `folder` gives.

    Raises:
        ModelError: it is not known here, or its package cannot be imported; names both.
    """
    if kind in OURS:
        return OURS[kind]
    points = extensions.installed(ENTRY_POINTS)
    if kind not in points:
        raise ModelError(
            f"{folder} holds a model of the kind {kind!r}, which is not known here; there are "
            f"{', '.join(sorted({*OURS, *points}))}: install the package that brings it (entry points {ENTRY_POINTS})"
        )
    with extensions.importing(f"{folder}: its kind {kind!r}", ModelError):
        found = points[kind].load()
    if not isinstance(found, ModelKind):
        raise ModelError(f"{folder}: its kind {kind!r} is a {type(found).__name__}, and must be a ModelKind")
    return found


def configuration(folder: str) -> dict[str, Any]:
    """What a folder of no CLIP model says that its model is: its kind and `config.json`, where it has one.

    Raises:
        ModelError: its kind is not known, or it is an image encoder without a configuration.
        DocumentError: the configuration is no JSON object.
    """
    kind = layout.kind_of(folder)
    find(kind, folder)
    file = storage.join(folder, layout.LIBRARY_NAMES[0])
    if kind == layout.IMAGE_ENCODER:
        raise ModelError(
            f"{folder} is no image encoder of timm, transformers or PanDerm: {file} is missing or of none of them"
        )
    return {"kind": kind, "config": storage.read_object(file) if storage.exists(file) else None}
