"""Raw corpus → prepared corpus: the graph, top to bottom.

    read the table ─ plan ─▶ Ray Data: make each shard ─▶ records ─▶ Ray Data: find duplicates ─ reconcile
                                                   ─▶ Ray Data: write some shards again ─▶ report ─ manifest

Plan and reconciliation are made in the driver. A worker reads the images of one shard, writes one Parquet file and
returns a small record. The manifest is written last; whatever happens before may be lost or repeated without a trace.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dermray import interrupts, ledger, storage
from dermray.audit.duplicates import near_groups, resembling
from dermray.audit.leakage import read_hashes
from dermray.corpus.manifest import Manifest
from dermray.errors import CorpusError
from dermray.prepare import report, told
from dermray.prepare.commit import commit, generation_of, publish, remove_unnamed, with_sides
from dermray.prepare.generations import tables_of
from dermray.prepare.graph import KEPT, make_shards, make_sides
from dermray.prepare.held_sides import held_sides
from dermray.prepare.reconcile import Excluded, Reconciled, reconcile
from dermray.prepare.records import ShardRecord
from dermray.prepare.restoring import write_again
from dermray.prepare.rewriting.captions import RewriteStats
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.prepare.sides import Sides, gathered, join
from dermray.prepare.work import Work, check_ceiling, look, read, tell
from dermray.printable import printable
from dermray.raw.sources import OF_FILES
from dermray.raw.sources.rows import RawTable

__all__ = ["PrepareResult", "Work", "look", "prepare", "read"]


@dataclass(frozen=True)
class PrepareResult:
    """What a run came to. `unchanged` says that the corpus was there already; `tables` is what it all came from.

    `dropped` are rows in no sample, in words: by reason, with the first rows of each.
    """

    output: str
    manifest: Manifest
    stats: dict[str, Any]
    num_shards_made: int
    num_shards_found: int
    seconds: float
    unchanged: bool
    rewritten: tuple[RewriteStats, ...] = ()
    tables: tuple[RawTable, ...] = ()
    dropped: str = ""

    @property
    def report_uri(self) -> str:
        """The HTML report."""
        return storage.join(self.output, report.REPORT)

    def metrics(self) -> dict[str, float]:
        """Figures of the run, for tracking."""
        return {
            "rows": self.stats["rows"]["in"],
            "rows_dropped": self.stats["rows"]["dropped"],
            "samples": self.manifest.num_samples,
            "pairs": self.stats["pairs"],
            "corpus_version": self.manifest.version,
            "shards_made": self.num_shards_made,
            "shards_found": self.num_shards_found,
            "seconds": self.seconds,
            **{f"duplicates_{name}": value for name, value in self.stats["duplicates"].items()},
            **{name: value for done in self.rewritten for name, value in done.metrics().items()},
        }


def prepare(config: PrepareConfig, work: Work | None = None) -> PrepareResult:
    """Prepare a corpus on the connected Ray cluster; run again, it goes on where it was.

    Args:
        work: what `read` has found, inside the caller's claim of the output.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        CorpusError: as `read`; or no image is usable, or more rows are bad than `max_dropped_fraction` allows.
        OntologyError: the disease tree is malformed.
        StorageError: the input or the output fails for good.
        StoppedError: it was interrupted.
    """
    with interrupts.telling(lambda: KEPT), ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _prepare(config, work or read(config))


def _prepare(config: PrepareConfig, work: Work) -> PrepareResult:
    started = time.monotonic()
    timing = work.timing
    with timing.stage("make shards", tells=True):
        made, num_fresh = _make(config, work)
    if work.committed.generations and not any(record.shard for record in made):
        return _nothing_new(config, work, len(made), started)
    with timing.stage("find duplicates", tells=True):
        decided = _reconcile(config, work, made)
    with timing.stage("write shards again", tells=True):
        maker, tell_stats = _maker(config, work), work.timing.ray_data.append
        final, num_restored = write_again(config, decided, work.committed.held, work.plan.shards, maker, tell_stats)
    tell(told.of_equal_images(decided, final))
    generation = generation_of(config, work, made, decided, final)
    sides = _side_tables(config, work, final, made)
    with timing.stage("report and commit"):
        manifest, stats, unchanged = commit(
            config, work.committed, generation, made, final, work.captions_from, timing.to_json(), sides
        )
    return PrepareResult(
        output=config.output,
        manifest=manifest,
        stats=stats,
        num_shards_made=num_fresh + num_restored,
        num_shards_found=len(made) - num_fresh - num_restored,
        seconds=time.monotonic() - started,
        unchanged=unchanged,
        rewritten=work.rewritten,
        tables=tables_of([*work.committed.generations, generation]),
        dropped=report.reasons_in_words(
            [row for _, row in report.all_dropped([*work.committed.generations, generation])],
            by_name=config.source in OF_FILES,
        ),
    )


def _nothing_new(config: PrepareConfig, work: Work, num_shards: int, started: float) -> PrepareResult:
    """The corpus as it is: it holds every usable row already. A run that was to add others may have left its report."""
    held = work.committed
    sides = _side_tables(config, work, held.held, ())
    before = Manifest.load(config.output)
    manifest = with_sides(before, config, sides)
    made = held.made(held.generations)
    stats, _ = publish(config, manifest, held.generations, made, held.held, work.timing.to_json(), sides)
    if manifest != before:
        # Side tables are others, and the files of those before lie there still.
        with ledger.claim(config.output) as claim:
            claim.confirm()
            remove_unnamed(config.output, manifest, held.generations)
    return PrepareResult(
        output=config.output,
        manifest=manifest,
        stats=stats,
        num_shards_made=0,
        num_shards_found=num_shards,
        seconds=time.monotonic() - started,
        unchanged=manifest == before,
        tables=tables_of(held.generations, work.tables),
    )


def _make(config: PrepareConfig, work: Work) -> tuple[list[ShardRecord], int]:
    """Records of all shards in the order of the plan, and how many had to be made."""
    records: list[ShardRecord] = []
    dropped = list(work.plan.dropped)
    num_fresh = 0
    if work.plan.shards:
        maker, tell_stats = _maker(config, work), work.timing.ray_data.append
        for record, fresh, seconds in make_shards(config, work.plan.shards, maker, tell_stats=tell_stats):
            records.append(record)
            num_fresh += fresh
            dropped.extend(record.dropped)
            work.timing.tasks.update({kind: work.timing.tasks[kind] + spent for kind, spent in seconds.items()})
            check_ceiling(config, dropped, num_rows=work.num_rows, nothing_left=False)
    place = {(spec.split, spec.index): number for number, spec in enumerate(work.plan.shards)}
    return sorted(records, key=lambda record: place[record.place]), num_fresh


def _reconcile(config: PrepareConfig, work: Work, made: Sequence[ShardRecord]) -> Reconciled:
    held = work.committed.held
    if not any(record.shard for record in (*held, *made)):
        rows = [*work.plan.dropped, *(row for record in made for row in record.dropped)]
        uri = report.list_dropped(config.output, [(config.input, row) for row in rows])
        found = report.reasons_in_words(rows, by_name=config.source in OF_FILES)
        raise CorpusError(f"no image of {config.input} is usable: {found}; they are listed in {uri}")
    return reconcile(
        held,
        made,
        policy=config.near_duplicates,
        near_groups=partial(near_groups, max_distance=config.max_distance),
        excluded=_excluded(config.exclude, config.max_distance),
    )


def _excluded(corpora: Sequence[str], max_distance: int) -> Excluded | None:
    """Which hashes resemble one of the evaluation corpora that the user names."""
    if not corpora:
        return None
    hashes = np.concatenate([read_hashes(uri, Manifest.load(uri))[1] for uri in corpora])
    return partial(resembling, others=hashes, max_distance=max_distance)


def _maker(config: PrepareConfig, work: Work) -> ShardMaker:
    return ShardMaker(config, work.ontology, with_modality=work.with_modality)


def _side_tables(config: PrepareConfig, work: Work, final: Sequence[ShardRecord], made: Sequence[ShardRecord]) -> Sides:
    """The side tables beside these shards, with what became of their rows; told as it is known."""
    held = held_sides(config, work.committed, made)
    is_ours = None if held is None else held.is_ours
    joined = {name: join(config, name, cells, final, is_ours) for name, cells in work.side_tables.items()}
    if held is not None:
        joined = held.beside(joined, final)
    if not joined:
        return Sides()
    with work.timing.stage("side tables", tells=True):
        rows = [shard for each in joined.values() for shard in each.shards]
        found = gathered(config, joined, dict(make_sides(config, rows, work.timing.ray_data.append)))
    for name, figures in found.figures.items():
        rows_told = found.dropped[name]
        where = f": {report.reasons_in_words(rows_told)}" if rows_told else ""
        line = f"side table {name}: {figures['used']:,} of {figures['in']:,} rows, {len(rows_told):,} left out{where}"
        print(f"prepare: {printable(line)}", flush=True)
    return found
