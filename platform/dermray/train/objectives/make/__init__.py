"""MAKE and O-MAKE: an image, and its patches, compared with several texts of every sample of the global batch."""

from typing import Any

from dermray.corpus.manifest import Manifest
from dermray.ingest.plan import Counts
from dermray.train.objectives.contrastive import OBJECTIVE as CONTRASTIVE
from dermray.train.objectives.contrastive.texted import texted, with_aspects
from dermray.train.objectives.kinds import ObjectiveKind
from dermray.train.objectives.make.settings import MakeConfig


def _read(config: Any, split: Manifest) -> Counts | None:
    """Samples with a text that is read: where sub-captions are not, one that has nothing else is not drawn."""
    if config.objective.sub_captions:
        return texted(config, split)
    return with_aspects(config, split, ["raw", "ontology", "concept"])


def _frozen(config: Any) -> list[str]:
    return [] if config.objective.knowledge is None else [config.objective.knowledge]


# Validated as one image and one text are.
OBJECTIVE = ObjectiveKind(
    MakeConfig,
    "dermray.train.objectives.make.module",
    scores=CONTRASTIVE.scores,
    counts=_read,
    parts=CONTRASTIVE.parts,
    frozen=_frozen,
)
