"""The samples that a preparation's report shows, with a thumbnail each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dermray import reporting, storage
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.shards import read_row_group
from dermray.prepare.records import ShardRecord

NUM_THUMBNAILS = 24
NUM_TWINS = 8
NUM_TWIN_SHOTS = 4


def samples_shown(output: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Some samples, spread over the shards, each with a thumbnail."""
    step = max(1, len(manifest.shards) // NUM_THUMBNAILS)
    chosen = manifest.shards[::step][:NUM_THUMBNAILS]
    each = -(-NUM_THUMBNAILS // max(1, len(chosen)))
    places = [(shard, position) for shard in chosen for position in range(min(each, shard.row_groups[0]))]
    return [_shot(output, shard, position) for shard, position in places[:NUM_THUMBNAILS]]


def twins_shown(output: str, final: Sequence[ShardRecord]) -> list[list[dict[str, Any]]]:
    """The largest groups of near-duplicates, the first members of each."""
    places: dict[str, list[tuple[Shard, int]]] = defaultdict(list)
    for record in final:
        if record.shard is None:
            continue
        for position, group in enumerate(record.notes["duplicate_group"].to_pylist()):
            if group is not None:
                places[group].append((record.shard, position))
    largest = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))[:NUM_TWINS]
    return [[_shot(output, shard, position) for shard, position in found[:NUM_TWIN_SHOTS]] for _, found in largest]


def _shot(output: str, shard: Shard, position: int) -> dict[str, Any]:
    """One sample with a thumbnail."""
    columns = ["image", "captions", "labels", "concepts", "split", "source_id", "skin_type"]
    group = position // shard.row_groups[0]
    table = read_row_group(storage.inside(output, shard.path), group, columns)
    row = table.slice(position - group * shard.row_groups[0], 1).to_pylist()[0]
    return {**row, "thumbnail": reporting.thumbnail(row.pop("image"), max_side=220)}
