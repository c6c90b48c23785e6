"""Samples without any text are no pairs: contrastive learning draws none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import CaptionAspect
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
    return with_aspects(config, split, get_args(CaptionAspect))


def with_aspects(config: Any, split: Manifest, aspects: Sequence[CaptionAspect]) -> Counts:
    """1 for each sample of a split that has a caption of one of these kinds, 0 for the others, the same each epoch.

    Args:
        config: of the run, `train.settings.PretrainConfig`.
        split: the manifest of one split.
        aspects: the kinds.

    Raises:
        CorpusError: a shard is gone or damaged.
    """
    # Digests of whole shards are the loader's to check, where it reads the images.
    tables = ShardIndex.of(config.corpus, split, "pages").row_groups([_ASPECTS])
    found = []
    for table in tables:
        captions = table["captions"].combine_chunks()
        # [[raw, sub], [], [sub]] with the kinds (raw) is [1, 0, 0].
        wanted = pc.is_in(pc.struct_field(pc.list_flatten(captions), "aspect"), value_set=pa.array(aspects))
        rows = pc.list_parent_indices(captions).to_numpy()[wanted.to_numpy(zero_copy_only=False)]
        found.append(np.bincount(rows, minlength=len(captions)) > 0)
    drawn = np.concatenate(found).astype(np.int64)
    return lambda epoch: drawn
