"""Samples without any text are no pairs: contrastive learning draws none of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

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
    # Digests of whole shards are the loader's to check, where it reads the images.
    tables = ShardIndex.of(config.corpus, split, "pages").row_groups([_ASPECTS])
    numbers = np.concatenate([pc.list_value_length(table["captions"]).to_numpy() for table in tables])
    drawn = (numbers > 0).astype(np.int64)
    return lambda epoch: drawn
