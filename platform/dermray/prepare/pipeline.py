"""Raw corpus → prepared corpus: the graph, top to bottom.

    read the table ─ plan ─▶ Ray Data: make each shard ─▶ records ─▶ Ray Data: find duplicates ─ reconcile
                                                   ─▶ Ray Data: write some shards again ─▶ report ─ manifest

Plan and reconciliation are made in the driver. A worker reads the images of one shard, writes one Parquet file and
returns a small record. The manifest is written last; whatever happens before may be lost or repeated without a trace.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dermray import interrupts, ledger, storage
from dermray.corpus.branches import Branch
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.prepare import labels, report, told
from dermray.prepare.commit import commit, publish
from dermray.prepare.duplicates import near_groups, resembling
from dermray.prepare.fetch import ahead
from dermray.prepare.generations import NUM_READERS, Generation, Standing, content, identity, standing, tables_of
from dermray.prepare.graph import KEPT, amend_shards, make_shards
from dermray.prepare.leakage import read_hashes
from dermray.prepare.plan import Plan, ShardSpec, plan_shards, usable_rows, without_known
from dermray.prepare.reconcile import Amendment, Excluded, Reconciled, reconcile
from dermray.prepare.records import RECORDS, ShardRecord, read_record, record_uri
from dermray.prepare.rewriting.captions import RewriteStats, rewrite_captions
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import DATA, ShardMaker
from dermray.prepare.sources import OF_FILES, RawRows, SourceRequest
from dermray.prepare.sources import read as read_source
from dermray.prepare.sources.rows import EXCLUDED, DroppedRow, RawTable
from dermray.prepare.timing import Timing
from dermray.printable import printable


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


@dataclass(frozen=True)
class Work:
    """What there is to do, found without Ray."""

    plan: Plan
    ontology: Ontology
    standing: Standing
    captions_from: Mapping[CaptionAspect, str] = field(default_factory=dict)
    rewritten: tuple[RewriteStats, ...] = ()
    branches: tuple[Branch, ...] = ()
    tables: tuple[RawTable, ...] = ()
    not_understood: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)
    told: told.Counts = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    @property
    def num_rows(self) -> int:
        """Rows that count for the limit on bad ones: what a committed corpus holds already counts as good."""
        committed = self.standing.made(self.standing.generations)
        return self.plan.num_rows + sum(record.num_rows - len(record.dropped) for record in committed)

    @property
    def is_void(self) -> bool:
        """True if there is no image to look at, now or before."""
        return not self.plan.shards and not self.standing.generations


def read(config: PrepareConfig) -> Work:
    """Read the table and make the plan: whatever is wrong with them shows here, before Ray starts.

    Raises:
        ConfigError: captions are to be rewritten, and the key is missing or the source brings its own.
        CorpusError: the input has no table, a column is missing, too many rows are bad as they stand, or the corpus
            at the output cannot take them in.
        EndpointError: the language model that is to rewrite captions cannot be used.
        OntologyError: the disease tree is malformed.
        StorageError: the input cannot be read.
    """
    timing = Timing()
    with timing.stage("read the table"):
        request = SourceRequest(config.input, config.table, config.columns, config.limit)
        raw = read_source(config.source, request)
    if config.rewrite.mode != "off":
        # A model is asked only once the table has turned out to be sound.
        _check_ceiling(config, usable_rows(raw).dropped, num_rows=raw.num_rows, nothing_left=False)
    with timing.stage("rewrite captions", tells=True):
        raw, rewritten = rewrite_captions(raw, config.rewrite, output=config.output)
    work = _planned(config, request, raw, rewritten, timing)
    _check_ceiling(config, work.plan.dropped, num_rows=work.num_rows, nothing_left=work.is_void)
    return work


def look(config: PrepareConfig) -> Work:
    """`read` without anything that writes or costs: no caption is rewritten, and any number of rows may be bad.

    Raises:
        CorpusError, OntologyError, StorageError: as `read`.
    """
    request = SourceRequest(config.input, config.table, config.columns, config.limit)
    return _planned(config, request, read_source(config.source, request), (), Timing(), dry=True)


def _planned(
    config: PrepareConfig,
    request: SourceRequest,
    raw: RawRows,
    rewritten: tuple[RewriteStats, ...],
    timing: Timing,
    *,
    dry: bool = False,
) -> Work:
    """What there is to do with raw rows, told as it is found; `dry`: in full, since no report will list it."""
    with timing.stage("plan"):
        usable = usable_rows(raw)
        committed = standing(config, usable)
        held = committed.holdings()
        if held.images:
            usable = without_known(usable, config.input, held.images)
        plan = plan_shards(
            usable, split=config.split, seed=config.seed, rows_per_shard=config.rows_per_shard, held=held
        )
        tree = _tree(raw, committed.ontology)
        ontology, learned = labels.learn_branches(raw.table, tree)
    print(_announce(config, plan, committed), flush=True)
    found = told.of_rows(config, request, raw, usable, (tree, ontology), whole=dry)
    _tell(found)
    return Work(
        plan,
        ontology,
        committed,
        captions_from=_captions_from(config, raw),
        rewritten=rewritten,
        branches=tuple(learned),
        tables=tuple(request.tables.values()),
        not_understood=raw.not_understood,
        placeholders=request.findings.placeholders,
        told=found.counts,
        timing=timing,
    )


def _tell(found: told.Told) -> None:
    for line in found.lines:
        print(f"prepare: {printable(line)}", flush=True)


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
    if work.standing.generations and not any(record.shard for record in made):
        return _nothing_new(config, work, len(made), started)
    with timing.stage("find duplicates", tells=True):
        decided = _reconcile(config, work, made)
    with timing.stage("write shards again", tells=True):
        final, num_restored = _amend(config, work, decided)
    _tell(told.of_equal_images(decided, final))
    generation = _generation(config, work, made, decided, final)
    with timing.stage("report and commit"):
        manifest, stats, unchanged = commit(
            config, work.standing, generation, made, final, work.captions_from, timing.to_json()
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
        tables=tables_of([*work.standing.generations, generation]),
        dropped=report.reasons_in_words(
            [row for _, row in report.all_dropped([*work.standing.generations, generation])],
            by_name=config.source in OF_FILES,
        ),
    )


def _nothing_new(config: PrepareConfig, work: Work, num_shards: int, started: float) -> PrepareResult:
    """The corpus as it is: it holds every usable row already. A run that was to add others may have left its report."""
    manifest, held = Manifest.load(config.output), work.standing
    made = held.made(held.generations)
    stats, _ = publish(config, manifest, held.generations, made, held.held, work.timing.to_json())
    return PrepareResult(
        output=config.output,
        manifest=manifest,
        stats=stats,
        num_shards_made=0,
        num_shards_found=num_shards,
        seconds=time.monotonic() - started,
        unchanged=True,
        tables=tables_of(held.generations, work.tables),
    )


def _captions_from(config: PrepareConfig, raw: RawRows) -> dict[CaptionAspect, str]:
    """How each caption aspect is made, in words: by the source, or else by this package."""
    made: dict[CaptionAspect, str] = {
        "ontology": "the published sentence over the path of the diagnosis",
        "concept": "the published sentence over the visible features",
    }
    if config.sub_captions:
        made["sub"] = f"the first {config.sub_captions} sentences of the raw caption"
    return {**made, **raw.captions_from}


def _tree(raw: RawRows, held: Ontology | None) -> Ontology:
    """The source's disease tree, joined to that of the corpus; one level over its labels if it publishes none."""
    if raw.ontology is not None:
        return held.union(raw.ontology) if held else raw.ontology
    times = labels.counted(raw.table)
    if held is None:
        return Ontology.folded(times)
    return held.union(Ontology.folded({label: n for label, n in times.items() if not held.resolve_all(label).labels}))


def _announce(config: PrepareConfig, plan: Plan, committed: Standing) -> str:
    images = Counter[str]()
    for spec in plan.shards:
        images[spec.split] += len(set(spec.rows["image"].to_pylist()))
    shown = ", ".join(f"{split} {count:,}" for split, count in images.items()) or "none"
    held = sum(record.notes.num_rows for record in committed.held)
    joins = f", to join {held:,} samples of {config.output}" if held else ""
    return (
        f"prepare: {plan.num_rows:,} rows of {config.source}, {plan.num_images:,} images ({shown}) "
        f"in {len(plan.shards):,} shards{joins}"
    )


def _make(config: PrepareConfig, work: Work) -> tuple[list[ShardRecord], int]:
    """Records of all shards in the order of the plan, and how many had to be made."""
    records: list[ShardRecord] = []
    dropped = list(work.plan.dropped)
    num_fresh = 0
    if work.plan.shards:
        maker, tell_stats = ShardMaker(config, work.ontology), work.timing.ray_data.append
        for record, fresh, seconds in make_shards(config, work.plan.shards, maker, tell_stats=tell_stats):
            records.append(record)
            num_fresh += fresh
            dropped.extend(record.dropped)
            work.timing.tasks.update({kind: work.timing.tasks[kind] + spent for kind, spent in seconds.items()})
            _check_ceiling(config, dropped, num_rows=work.num_rows, nothing_left=False)
    place = {(spec.split, spec.index): number for number, spec in enumerate(work.plan.shards)}
    return sorted(records, key=lambda record: place[record.place]), num_fresh


def _check_ceiling(config: PrepareConfig, dropped: Sequence[DroppedRow], *, num_rows: int, nothing_left: bool) -> None:
    """Stop while it is cheap when too much of the table is bad; finished shards stay for the next run."""
    bad = [row for row in dropped if row.reason != EXCLUDED]
    if len(bad) <= config.max_dropped_fraction * num_rows and not nothing_left:
        return
    by_name = config.source in OF_FILES
    uri = report.list_dropped(config.output, [(config.input, row) for row in dropped])
    found = f"{len(bad):,} of {num_rows:,} rows are unusable so far: {report.reasons_in_words(bad, by_name=by_name)}"
    if nothing_left:
        raise CorpusError(f"nothing to prepare from {config.input}: {found}; they are listed in {uri}")
    raise CorpusError(
        f"stopped: {found}, more than max_dropped_fraction={config.max_dropped_fraction:g} allows; they are listed in "
        f"{uri}; mend the input or raise the limit and run again"
    )


def _reconcile(config: PrepareConfig, work: Work, made: Sequence[ShardRecord]) -> Reconciled:
    held = work.standing.held
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
        excluded=_excluded(config),
    )


def _excluded(config: PrepareConfig) -> Excluded | None:
    """Which hashes resemble one of an evaluation corpus that the user names."""
    if not config.exclude:
        return None
    hashes = np.concatenate([read_hashes(uri, Manifest.load(uri))[1] for uri in config.exclude])
    return partial(resembling, others=hashes, max_distance=config.max_distance)


def _amend(config: PrepareConfig, work: Work, decided: Reconciled) -> tuple[list[ShardRecord], int]:
    """Write again what must change; the records of the corpus's shards in order, and how many were made anew for it."""
    sizes = storage.file_sizes(storage.join(config.output, DATA))
    finished = _finished(config, decided, sizes)
    pending = [each for each in decided.amendments if each.key not in finished]
    num_restored = _restore(config, work, decided, pending, sizes)
    if pending:
        amended = amend_shards(config, pending, work.ontology, work.timing.ray_data.append)
        finished.update((record.key, record) for record in amended)
    final = [shard if isinstance(shard, ShardRecord) else finished.get(shard.key) for shard in decided.shards]
    return [record for record in final if record is not None], num_restored


def _finished(config: PrepareConfig, decided: Reconciled, sizes: Mapping[str, int]) -> dict[str, ShardRecord]:
    """The records of amendments that an earlier run has written, and whose shards are whole."""
    there = storage.file_sizes(storage.join(config.output, RECORDS))
    keys = [each.key for each in decided.amendments if record_uri(config.output, each.key) in there]
    records = ahead(keys, lambda key: read_record(config.output, key), num_threads=NUM_READERS)
    return {record.key: record for record in records if record.shard and _is_whole(config, record.shard, sizes)}


def _restore(
    config: PrepareConfig, work: Work, decided: Reconciled, pending: Sequence[Amendment], sizes: Mapping[str, int]
) -> int:
    """Make anew the shards whose files are needed and gone: committed as they are, or read by an amendment to be made.

    Returns how many had to be made.

    Raises:
        CorpusError: such a shard is of another source.
    """
    needed = {shard.key: shard.shard for shard in decided.shards if isinstance(shard, ShardRecord) and shard.shard}
    records = {record.key: record for record in work.standing.held}
    origins = dict.fromkeys(key for amendment in pending for key in amendment.origins)
    unknown = [key for key in origins if key not in records]
    read = ahead(unknown, lambda key: read_record(config.output, key), num_threads=NUM_READERS)
    records.update((record.key, record) for record in read)
    needed.update((key, shard) for key in origins if (shard := records[key].shard))
    gone = {key.rpartition("-")[0]: shard for key, shard in needed.items() if not _is_whole(config, shard, sizes)}
    specs = [spec for spec in work.plan.shards if spec.name in gone]
    lost = sorted(gone.keys() - {spec.name for spec in specs})
    if lost:
        raise CorpusError(
            f"{config.output} lacks {gone[lost[0]].path}, which this input does not give again: prepare the corpus "
            "anew with if_exists=replace"
        )
    if specs:
        return sum(
            made.fresh for made in make_shards(config, specs, ShardMaker(config, work.ontology), needs_files=True)
        )
    return 0


def _is_whole(config: PrepareConfig, shard: Shard, sizes: Mapping[str, int]) -> bool:
    return sizes.get(storage.inside(config.output, shard.path)) == shard.num_bytes


def _generation(
    config: PrepareConfig,
    work: Work,
    made: Sequence[ShardRecord],
    decided: Reconciled,
    final: Sequence[ShardRecord],
) -> Generation:
    left_out = {sample.image: sample for sample in decided.left_out}
    rows = [
        DroppedRow(
            row["row"], row["source_id"], row["image"], left_out[row["image"]].reason, left_out[row["image"]].detail
        )
        for row in _rows_of(work.plan.shards, left_out)
    ]
    dropped = [*work.plan.dropped, *(row for record in made for row in record.dropped)]
    return Generation(
        number=len(work.standing.generations) + 1,
        identity=identity(config),
        content=content(config),
        made=tuple(record.key for record in made),
        final=tuple(record.key for record in final),
        num_rows=work.plan.num_rows,
        dropped=tuple(sorted(dropped, key=lambda row: row.row)),
        ontology=work.ontology.to_json(),
        left_out=tuple(sorted(rows, key=lambda row: row.row)),
        left_out_images=tuple(sorted(digest for sample in decided.left_out for digest in sample.known)),
        figures=decided.figures,
        rewritten=tuple(done.to_json() for done in work.rewritten),
        branches=tuple(branch.to_json() for branch in work.branches),
        tables=work.tables,
        placeholders=dict(sorted(work.placeholders.items())),
        told={**work.told, **told.of_equal_images(decided, final).counts},
        not_understood={name: dict(sorted(texts.items())) for name, texts in work.not_understood.items()},
    )


def _rows_of(specs: Sequence[ShardSpec], paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not paths:
        return []
    columns = ["row", "source_id", "image"]
    return [row for spec in specs for row in spec.rows.select(columns).to_pylist() if row["image"] in paths]
