"""Samples without any text are no pairs: contrastive learning draws none of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.ingest.plan import Counts

# Of the captions this is enough to count them.
_ASPECTS = "captions.list.element.aspect"


def texted(config: Any, split: Manifest) -> Counts | None:
    """1 for each sample of a split that has a caption, 0 for the others, the same each epoch; None: all have some.

    Args:
        config: of the run, `train.settings.PretrainConfig`.
        split: the manifest of one split.

    Raises:
        CorpusError: a shard is gone or damaged.
    """
    if not any(split.untexted.get(name) for name in split.splits):
        return None
    index = ShardIndex.of(config.corpus, split, config.data.verify)
    tables = index.row_groups([_ASPECTS])
    counts = np.concatenate([[min(1, len(each)) for each in table["captions"].to_pylist()] for table in tables])
    drawn = counts.astype(np.int64)
    return lambda epoch: drawn
