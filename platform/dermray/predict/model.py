"""Which model is served: where its files are, what the registry calls it, and what every answer says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dermray import storage
from dermray.corpus.ontology import ONTOLOGY_NAME, display_names
from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX, folder_uri
from dermray.models import kinds, layout

if TYPE_CHECKING:
    from dermray.models.kinds import Answer
    from dermray.vectors.encoder import Encoder


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are and how it is called.

    `uri` is what `Encoder.load` takes; `version` and `alias` come from the registry and are None for a folder or
    an architecture's name; `classes` is the model's own class list, perhaps empty; `kind` is one of
    `dermray.models.kinds`.
    """

    uri: str
    name: str
    version: str | None = None
    alias: str | None = None
    classes: tuple[str, ...] = ()
    ontology_uri: str | None = None
    kind: str = layout.CLIP


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The identity of a loaded model, as every answer carries it.

    `digest` is the SHA-256 of the weights and `preprocessing_digest` that of the steps from bytes to pixels: two
    answers are comparable when both agree. `logit_scale` is exponentiated, and None where the model takes no texts.
    `answers` is what it can be asked (`dermray.models.kinds`).
    """

    name: str
    version: str | None
    alias: str | None
    digest: str
    preprocessing_digest: str
    embedding_dim: int
    image_size: int
    context_length: int
    parameters: int
    logit_scale: float | None
    classes: tuple[str, ...]
    kind: str = layout.CLIP
    answers: frozenset[Answer] = kinds.OURS[layout.CLIP].answers

    @property
    def names(self) -> frozenset[str]:
        """Every spelling by which a request may ask for this model."""
        spellings = {self.name}
        if self.version is not None:
            spellings |= {f"{self.name}/{self.version}", f"models:/{self.name}/{self.version}"}
        if self.alias is not None:
            spellings |= {f"{self.name}@{self.alias}", f"models:/{self.name}@{self.alias}"}
        return frozenset(spellings)


def locate(uri: str, *, name: str | None = None, version: str | None = None, alias: str | None = None) -> ModelSource:
    """Find a model folder and read what it says of itself; anything else is taken as an architecture's name.

    Args:
        uri: a model folder's path or URI, `local-dir:PATH`, `hf-hub:ORG/NAME`, or an architecture's name.
        name: what to call it; by default the folder's or the architecture's own name.
        version: the registry's version, where it has one.
        alias: the registry's alias by which it was asked for.

    Raises:
        ModelError: the folder holds no model or one of an unknown kind, its `dermray.json` is malformed, or the
            name is no architecture's.
    """
    folder = folder_uri(uri)
    if folder is None:
        if not uri.startswith(HUB_PREFIX):
            _require_architecture(uri)
        return ModelSource(uri=uri, name=name or uri, version=version, alias=alias)
    kind = layout.kind_of(folder)
    kinds.find(kind, folder)
    if kind == layout.CLIP and not storage.exists(storage.join(folder, layout.CONFIG_NAME)):
        raise ModelError(
            f"{folder} is not a model folder: it has no {layout.CONFIG_NAME}; give a folder that jobs/pretrain.py "
            "wrote, an open_clip folder, or models:/NAME@ALIAS"
        )
    ontology_uri = storage.join(folder, ONTOLOGY_NAME)
    return ModelSource(
        uri=folder,
        name=name or storage.name_of(folder),
        version=version,
        alias=alias,
        classes=_own_classes(folder),
        ontology_uri=ontology_uri if storage.exists(ontology_uri) else None,
        kind=kind,
    )


def served_model(source: ModelSource, encoder: Encoder) -> ServedModel:
    """Join a source with what was loaded from it."""
    info = encoder.info
    return ServedModel(
        name=source.name,
        version=source.version,
        alias=source.alias,
        digest=info.model_digest,
        preprocessing_digest=info.preprocessing_digest,
        embedding_dim=info.embedding_dim,
        image_size=info.image_size,
        context_length=info.context_length,
        parameters=info.parameters,
        logit_scale=encoder.logit_scale if "texts" in encoder.answers else None,
        classes=source.classes,
        kind=source.kind,
        answers=encoder.answers,
    )


def _require_architecture(name: str) -> None:
    # Here, and not above: whoever serves a folder does not wait for torch in the driver.
    from dermray.models import architecture

    architecture(name)


def _own_classes(folder: str) -> tuple[str, ...]:
    file = storage.join(folder, layout.DERMRAY_NAME)
    try:
        provenance = storage.read_object(file)
    except FileNotFoundError:
        return ()
    classes = provenance.get("classes")
    if classes is None:
        return ()
    if not _is_list_of_text(classes):
        raise ModelError(f"{file}: classes must be a list of non-empty texts")
    return display_names(classes)


def _is_list_of_text(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, str) and item for item in value)
    )
