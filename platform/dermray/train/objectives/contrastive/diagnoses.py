"""What a sample has, by the disease tree of a run's corpora: what soft targets and duplicates of a diagnosis go by."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dermray.corpus.ontology import Ontology
from dermray.ingest.views import Row

if TYPE_CHECKING:
    from dermray.train.settings import PretrainConfig

# Of a batch: the number of each sample's first label, int64 `[n]`.
DIAGNOSIS = "diagnosis"


def tree_of(config: PretrainConfig) -> Ontology:
    """The disease tree of the run's corpora.

    Raises:
        CorpusError: one has none, or they contradict each other.
    """
    return functools.reduce(Ontology.union, map(Ontology.load, config.corpus_uris))


def numbers_of(tree: Ontology) -> dict[str, int]:
    """The number of each label: its row of `similarity_of`."""
    return {name: number for number, name in enumerate(tree)}


def similarity_of(tree: Ontology) -> npt.NDArray[np.float32]:
    """Between all labels of the tree, float32 `[C, C]`."""
    return tree.similarity(list(tree)).astype(np.float32)


def diagnosis_of(row: Row, numbers: Mapping[str, int]) -> int:
    """The number of a sample's first label, -1 without one that has a number."""
    return next((numbers.get(label, -1) for label in row["labels"]), -1)
