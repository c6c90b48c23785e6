"""The nodes of the disease tree that samples stand for, how often each is drawn, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.shards import ShardIndex
from dermray.ingest.plan import Counts


def some_of_each_node(config: Any, split: Manifest) -> Counts:
    """Draws of each sample of a split: of every node the same number in each epoch, going round its samples.

    Args:
        config: of the run, `train.settings.PretrainConfig`.
        split: the manifest of one split.

    Raises:
        CorpusError: the corpus has no disease tree, or a shard is gone or damaged.
    """
    numbers = {name: number for number, name in enumerate(Ontology.load(config.corpus))}
    tables = ShardIndex.of(config.corpus, split, "pages").row_groups(["labels"])
    nodes = [node_of(labels, numbers) for table in tables for labels in table["labels"].to_pylist()]
    return going_round(np.array(nodes, dtype=np.int64), config.objective.samples_per_node)


def going_round(nodes: np.ndarray, per_node: int) -> Counts:
    """1 for `per_node` samples of each node, or all if it has no more, 0 for the others; the next ones each epoch.

    Of the nodes `[4, 4, 4, -1, 7]`, two each: `[1, 1, 0, 0, 1]`, then `[1, 0, 1, 0, 1]`, then `[0, 1, 1, 0, 1]`.

    Args:
        nodes: int64 `[num_samples]`, -1 for samples that stand for none.
        per_node: at least 1.
    """
    _, which, sizes = np.unique(nodes, return_inverse=True, return_counts=True)
    order = np.argsort(which, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(nodes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = sizes[which]

    def counts(epoch: int) -> np.ndarray:
        return (((place - epoch * per_node) % size < per_node) & (nodes >= 0)).astype(np.int64)

    return counts


def node_of(labels: Sequence[str], numbers: Mapping[str, int]) -> int:
    """The number of a sample's first label that is a node; -1 without one."""
    return next((numbers[label] for label in labels if label in numbers), -1)


def said_of(tree: Ontology, name: str) -> list[str]:
    """What the tree says of a node: its names, and what it is a kind of.

    `eczema, dermatitis` below `inflammatory`: "eczema", "dermatitis", "eczema is a kind of inflammatory".
    """
    names, above = tree.synonyms(name), [tree.synonyms(node)[0] for node in tree.path(name)[:-1]]
    kinds = ", which is a kind of ".join(reversed(above))
    return [*names, f"{names[0]} is a kind of {kinds}"] if above else names


def drawn(texts: Sequence[str], num: int, random: np.random.Generator) -> list[str]:
    """`num` of some texts in random order; where there are fewer, all of them again and again."""
    order: list[int] = []
    while len(order) < num:
        order += random.permutation(len(texts)).tolist()
    return [texts[place] for place in order[:num]]
