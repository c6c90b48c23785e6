"""Which objectives there are, and the keys of each; what they compute with is imported only where they train.

A run names one by `objective.kind`: a folder beside this file, an entry point of the group `dermray.objectives` of an
installed package, or `package.module:ATTRIBUTE`. All three lead to an `ObjectiveKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from pydantic import Field

from dermray import extensions
from dermray.config import Config, DecidesWeights
from dermray.corpus.manifest import Manifest
from dermray.errors import ConfigError
from dermray.ingest.plan import Counts
from dermray.keys import Reader
from dermray.scales import Best
from dermray.train.trajectory import undeclared

DEFAULT = "contrastive"
ENTRY_POINTS = "dermray.objectives"
# What a folder beside this file calls its `ObjectiveKind`.
ATTRIBUTE = "OBJECTIVE"


class ObjectiveConfig(Config):
    """Keys of the objective; each kind has its own beside `kind`."""

    kind: DecidesWeights[str] = Field(
        DEFAULT,
        description=f"what is learned: {', '.join(extensions.folders(__package__))}, the name of an installed "
        "package's objective, or package.module:ATTRIBUTE",
    )

    @classmethod
    def prepared(cls, tree: Mapping[str, Any], reader: Reader) -> Mapping[str, Any]:
        """The keys by the types of the kind that is named; an unknown kind is told when it is validated."""
        named = tree.get("kind", DEFAULT)
        try:
            settings = find(str(getattr(named, "text", named))).settings
        except ValueError:
            return tree
        return reader.section(settings, tree, "objective.") if settings is not cls else tree


@dataclass(frozen=True)
class ObjectiveKind:
    """One thing that can be learned.

    Attributes:
        settings: its keys, each of which says whether it decides the weights.
        module: name of the module with its `check` and `build` (`dermray.train.objectives.contract`), imported by
            drivers and workers of a run that names it.
        scores: of its validation, and whether the highest or the lowest is best (`dermray.scales.best` says it by
            their names).
        counts: `(PretrainConfig, Manifest)` → draws of each sample of the split by epoch, or None; a pure function
            of both, the epoch and the corpus, with the same sum each epoch. A sample that the objective cannot use is
            drawn 0 times, one of a rare class perhaps twice. None: once each. A run does not resume with other draws.
            Of several corpora it is asked for each alone, by a configuration whose `corpus` is that one.
        items: likewise `(PretrainConfig, Manifest)` → int64 `[num_samples]`, samples of the item that begins with each,
            which follow each other in a row group; 0: none begins there (`dermray.ingest.items`). Batches are of items,
            `counts` says how often each is drawn at its first sample. None: every sample is an item.
        columns: `PretrainConfig` → columns that its views read, so that the driver refuses a corpus which lacks a side
            table of them (`sides.TABLE.COLUMN`) before workers start. None: it reads no side table.
        parts: names of the parts of its model that `optim.factors` and `train.lock` may name, if it obeys both. A run
            that names others is refused.
        toy: `PretrainConfig` → the keys `model` and `objective` of its toy (`dermray.train.toy`). None: the model is a
            tiny one of the same kind of towers, and the objective stays.
        frozen: `PretrainConfig` → model folders that the run reads throughout and keeps in no checkpoint, so that a
            resumed run is refused where their weights were replaced. None: there is none.
    """

    settings: type[ObjectiveConfig]
    module: str
    scores: Mapping[str, Best] = field(default_factory=dict)
    counts: Callable[[Any, Manifest], Counts | None] | None = None
    items: Callable[[Any, Manifest], np.ndarray] | None = None
    columns: Callable[[Any], Sequence[str]] | None = None
    parts: Sequence[str] = ()
    toy: Callable[[Any], Mapping[str, Any]] | None = None
    frozen: Callable[[Any], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        unsaid = undeclared(self.settings)
        if unsaid:
            raise ValueError(
                f"{self.settings.__name__}: {', '.join(unsaid)} must say DecidesWeights or LeavesWeights beside the key"
            )


@cache
def find(kind: str) -> ObjectiveKind:
    """The objective of a name or import path.

    Raises:
        ValueError: there is none; says which there are.
    """
    return extensions.find(
        kind, ObjectiveKind, package=__package__, group=ENTRY_POINTS, attribute=ATTRIBUTE, what="objective"
    )


def columns_of(config: Any) -> Sequence[str]:
    """What the objective of a run says that its views read; may leave out what no side table has."""
    said = find(config.objective.kind).columns
    return () if said is None else said(config)


def frozen_of(config: Any) -> Sequence[str]:
    """Model folders that the objective of a run (`PretrainConfig`) reads throughout and does not train."""
    said = find(config.objective.kind).frozen
    return () if said is None else said(config)


def require_parts(config: Any) -> None:
    """Refuse keys of a run (`PretrainConfig`) for parts that its objective's model does not have.

    Raises:
        ConfigError: names the key, the part and those there are.
    """
    kind = config.objective.kind
    parts = find(kind).parts
    for key, named in (("train.lock", config.train.lock), ("optim.factors", config.optim.factors)):
        unknown = [part for part in named if part not in parts]
        if unknown:
            raise ConfigError(
                f"{key}: the model of objective.kind={kind} has no part {', '.join(unknown)} that it could be said of; "
                f"there {'are ' + ', '.join(parts) if parts else 'is none'}"
            )


def settings_of(value: Any) -> ObjectiveConfig:
    """The section `objective` of a run, by the keys of the kind that it names.

    Raises:
        ValueError: there is no such kind; of pydantic: its keys do not fit.
    """
    if isinstance(value, ObjectiveConfig):
        return value
    tree = dict(value or {})
    return find(str(tree.get("kind", DEFAULT))).settings.model_validate(tree)
