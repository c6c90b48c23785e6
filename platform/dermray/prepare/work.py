"""What a preparation has to do: the rows of the table, and the plan of the shards. Ray reads long tables only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from dermray.corpus.branches import Branch
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import MODALITY, CaptionAspect
from dermray.errors import CorpusError
from dermray.prepare import labels, report, told
from dermray.prepare.digests import image_digests
from dermray.prepare.generations import CommittedCorpus, committed_corpus
from dermray.prepare.graph import read_pieces
from dermray.prepare.plan import Plan, plan_shards, usable_rows, without_known
from dermray.prepare.rewriting.captions import RewriteStats, rewrite_captions
from dermray.prepare.samples import MODALITIES
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.sides import read_side_tables
from dermray.prepare.splitting import require_groups
from dermray.prepare.timing import Timing
from dermray.printable import printable
from dermray.raw.sources import OF_FILES, RawRows, SourceRequest
from dermray.raw.sources import read as read_source
from dermray.raw.sources.rows import EXCLUDED, DroppedRow, RawTable
from dermray.raw.tables import StringTable


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    plan: Plan
    ontology: Ontology
    committed: CommittedCorpus
    captions_from: Mapping[CaptionAspect, str] = field(default_factory=dict)
    rewritten: tuple[RewriteStats, ...] = ()
    branches: tuple[Branch, ...] = ()
    tables: tuple[RawTable, ...] = ()
    not_understood: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)
    told: told.Counts = field(default_factory=dict)
    with_modality: bool = False
    side_tables: Mapping[str, StringTable] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    @property
    def num_rows(self) -> int:
        """Rows that count for the limit on bad ones: what a committed corpus holds already counts as good."""
        committed = self.committed.made(self.committed.generations)
        return self.plan.num_rows + sum(record.num_rows - len(record.dropped) for record in committed)

    @property
    def is_void(self) -> bool:
        """True if there is no image to look at, now or before."""
        return not self.plan.shards and not self.committed.generations


def read(config: PrepareConfig) -> Work:
    """Read the table and make the plan: whatever is wrong with them shows here, before an image is looked at.

    It shows before Ray starts, unless the table is so long that tasks read it (`sources.tables.TASKS_FROM_BYTES`).

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
        tasks = partial(read_pieces, config, timing.ray_data.append)
        request = SourceRequest(config.input, config.table, config.columns, config.limit, config.keep_untexted, tasks)
        raw = read_source(config.source, request)
        beside = read_side_tables(config, request.tables)
    if config.rewrite.mode != "off":
        # A model is asked only once the table has turned out to be sound.
        check_ceiling(
            config,
            usable_rows(raw, keep_untexted=config.keep_untexted).dropped,
            num_rows=raw.num_rows,
            nothing_left=False,
        )
    with timing.stage("rewrite captions", tells=True):
        raw, rewritten = rewrite_captions(raw, config.rewrite, output=config.output)
    work = _planned(config, request, raw, rewritten, timing, beside)
    check_ceiling(config, work.plan.dropped, num_rows=work.num_rows, nothing_left=work.is_void)
    return work


def look(config: PrepareConfig) -> Work:
    """`read` without anything that writes or costs: no caption is rewritten, and any number of rows may be bad.

    Raises:
        CorpusError, OntologyError, StorageError: as `read`.
    """
    request = SourceRequest(config.input, config.table, config.columns, config.limit, config.keep_untexted)
    raw, beside = read_source(config.source, request), read_side_tables(config, request.tables)
    return _planned(config, request, raw, (), Timing(), beside, dry=True)


def _planned(
    config: PrepareConfig,
    request: SourceRequest,
    raw: RawRows,
    rewritten: tuple[RewriteStats, ...],
    timing: Timing,
    beside: Mapping[str, StringTable],
    *,
    dry: bool = False,
) -> Work:
    """What there is to do with raw rows, told as it is found; `dry`: in full, since no report will list it."""
    with timing.stage("plan"):
        if config.keep_together:
            require_groups(raw.table)
        usable = usable_rows(raw, keep_untexted=config.keep_untexted)
        digests = cache(partial(image_digests, usable.table, config.input))
        committed = committed_corpus(config, digests)
        held = committed.contents()
        if len(held.images):
            usable = without_known(usable, digests(), held.images)
        del digests  # The cache holds some bytes a row.
        plan = plan_shards(
            usable,
            split=config.split,
            seed=config.seed,
            rows_per_shard=config.rows_per_shard,
            held=held,
            keep_together=config.keep_together,
        )
        tree = _tree(raw, committed.ontology)
        ontology, learned = labels.learn_branches(raw.table, tree)
    print(_announce(config, plan, committed), flush=True)
    found = told.of_rows(config, request, raw, usable, (tree, ontology), whole=dry)
    tell(found)
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
        with_modality=_has_modality(raw, committed),
        side_tables=beside,
        timing=timing,
    )


def tell(found: told.Told) -> None:
    """Say on the terminal what was told."""
    for line in found.lines:
        print(f"prepare: {printable(line)}", flush=True)


def _captions_from(config: PrepareConfig, raw: RawRows) -> dict[CaptionAspect, str]:
    """How each caption aspect is made, in words: by the source, or else by this package."""
    made: dict[CaptionAspect, str] = {
        "ontology": "the published sentence over the path of the diagnosis",
        "concept": "the published sentence over the visible features",
    }
    if config.sub_captions:
        made["sub"] = f"the first {config.sub_captions} sentences of the raw caption"
    return {**made, **raw.captions_from}


def _has_modality(raw: RawRows, committed: CommittedCorpus) -> bool:
    """Whether the kind of a picture is known of any sample of the corpus, so that its new shards have the column."""
    if raw.table[MODALITY.name].null_count < raw.table.num_rows:
        return True
    return any(MODALITIES in record.sample_counts for record in committed.held)


def _tree(raw: RawRows, held: Ontology | None) -> Ontology:
    """The source's disease tree, joined to that of the corpus; one level over its labels if it publishes none."""
    if raw.ontology is not None:
        return held.union(raw.ontology) if held else raw.ontology
    times = labels.counted(raw.table)
    if held is None:
        return Ontology.folded(times)
    return held.union(Ontology.folded({label: n for label, n in times.items() if not held.resolve_all(label).labels}))


def _announce(config: PrepareConfig, plan: Plan, committed: CommittedCorpus) -> str:
    images = Counter[str]()
    for spec in plan.shards:
        images[spec.split] += spec.num_images
    shown = ", ".join(f"{split} {count:,}" for split, count in images.items()) or "none"
    held = sum(record.notes.num_rows for record in committed.held)
    joins = f", to join {held:,} samples of {config.output}" if held else ""
    return (
        f"prepare: {plan.num_rows:,} rows of {config.source}, {plan.num_images:,} images ({shown}) "
        f"in {len(plan.shards):,} shards{joins}"
    )


def check_ceiling(config: PrepareConfig, dropped: Sequence[DroppedRow], *, num_rows: int, nothing_left: bool) -> None:
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
