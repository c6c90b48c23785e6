"""Shards that a run writes again, and those made anew because their files are needed and gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dermray import storage
from dermray.corpus.manifest import Shard
from dermray.errors import CorpusError
from dermray.prepare.amend import Amender
from dermray.prepare.generations import NUM_READERS
from dermray.prepare.graph import amend_shards, make_shards
from dermray.prepare.plan import ShardSpec
from dermray.prepare.reconcile import Amendment, Reconciled
from dermray.prepare.records import RECORDS, ShardRecord, read_record, record_uri
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import DATA, ShardMaker
from dermray.raw.fetch import ahead


def write_again(
    config: PrepareConfig,
    decided: Reconciled,
    held: Sequence[ShardRecord],
    specs: Sequence[ShardSpec],
    maker: ShardMaker,
    tell_stats: Callable[[str], None],
) -> tuple[list[ShardRecord], int]:
    """Write again what must change; the records of the corpus's shards in order, and how many were made anew for it.

    Args:
        decided: what becomes of each shard.
        held: the records of the corpus as it is committed.
        specs: the plan of this run's shards, the only ones that can be made anew.
        maker: of shards.
        tell_stats: takes Ray Data's account of the amendments.

    Raises:
        CorpusError: a shard whose file is needed and gone is of another source.
        DermRayError: a shard lost its worker again and again, also alone.
        StorageError: the output fails for good.
    """
    sizes = storage.file_sizes(storage.join(config.output, DATA))
    finished = _finished(config.output, decided.amendments, sizes)
    pending = [each for each in decided.amendments if each.key not in finished]
    lost = _lost(config.output, decided, held, pending, sizes)
    num_restored = 0
    if lost:
        again = _to_make(config.output, lost, specs)
        num_restored = sum(made.fresh for made in make_shards(config, again, maker, needs_files=True))
    if pending:
        amender = Amender(config.output, config.row_group_size, maker.ontology, maker.with_modality)
        finished.update((record.key, record) for record in amend_shards(config, pending, amender, tell_stats))
    final = [shard if isinstance(shard, ShardRecord) else finished.get(shard.key) for shard in decided.shards]
    return [record for record in final if record is not None], num_restored


def _finished(output: str, amendments: Sequence[Amendment], sizes: Mapping[str, int]) -> dict[str, ShardRecord]:
    """The records of amendments that an earlier run has written, and whose shards are whole."""
    there = storage.file_sizes(storage.join(output, RECORDS))
    keys = [each.key for each in amendments if record_uri(output, each.key) in there]
    records = ahead(keys, lambda key: read_record(output, key), num_threads=NUM_READERS)
    return {record.key: record for record in records if record.shard and _is_whole(output, record.shard, sizes)}


def _lost(
    output: str,
    decided: Reconciled,
    held: Sequence[ShardRecord],
    pending: Sequence[Amendment],
    sizes: Mapping[str, int],
) -> dict[str, Shard]:
    """Shards by name whose files are needed and gone: committed as they are, or read by an amendment to be made."""
    needed = {shard.key: shard.shard for shard in decided.shards if isinstance(shard, ShardRecord) and shard.shard}
    records = {record.key: record for record in held}
    origins = dict.fromkeys(key for amendment in pending for key in amendment.origins)
    unknown = [key for key in origins if key not in records]
    read = ahead(unknown, lambda key: read_record(output, key), num_threads=NUM_READERS)
    records.update((record.key, record) for record in read)
    needed.update((key, shard) for key in origins if (shard := records[key].shard))
    return {key.rpartition("-")[0]: shard for key, shard in needed.items() if not _is_whole(output, shard, sizes)}


def _to_make(output: str, lost: Mapping[str, Shard], specs: Sequence[ShardSpec]) -> list[ShardSpec]:
    """The plans of lost shards.

    Raises:
        CorpusError: one of them is of another source.
    """
    found = [spec for spec in specs if spec.name in lost]
    missing = sorted(lost.keys() - {spec.name for spec in found})
    if missing:
        raise CorpusError(
            f"{output} lacks {lost[missing[0]].path}, which this input does not give again: prepare the corpus "
            "anew with if_exists=replace"
        )
    return found


def _is_whole(output: str, shard: Shard, sizes: Mapping[str, int]) -> bool:
    return sizes.get(storage.inside(output, shard.path)) == shard.num_bytes
