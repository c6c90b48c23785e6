"""Raw corpus → prepared corpus: the graph, top to bottom.

    read the table ─ plan ─▶ Ray Data: one item a shard ─ map: make the shard ─▶ records ─ report ─ manifest

The plan is made in the driver. Each task reads the images of one shard, writes one Parquet file and returns a small
record. The manifest is written last; whatever happens before may be lost or repeated without a trace.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import pyarrow as pa
import ray
import ray.data

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError, DermRayError, StorageError
from dermray.prepare import report
from dermray.prepare.plan import Plan, ShardSpec, plan_shards
from dermray.prepare.progress import Progress
from dermray.prepare.rewriting.captions import RewriteStats, rewrite_captions
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import DATA, RECORDS, ShardMaker, ShardRecord, made_by
from dermray.prepare.sources import READERS, RawRows, SourceRequest
from dermray.prepare.sources.rows import EXCLUDED, DroppedRow


@dataclass(frozen=True)
class PrepareResult:
    """What a run came to. `unchanged` says that the corpus was there already, as it would be now."""

    output: str
    manifest: Manifest
    stats: dict[str, Any]
    num_shards_made: int
    num_shards_found: int
    seconds: float
    unchanged: bool

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
            "shards_made": self.num_shards_made,
            "shards_found": self.num_shards_found,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Work:
    """What there is to do, found without Ray."""

    plan: Plan
    ontology: Ontology
    captions_from: Mapping[CaptionAspect, str] = field(default_factory=dict)
    rewritten: tuple[RewriteStats, ...] = ()


def read(config: PrepareConfig) -> Work:
    """Read the table and make the plan: whatever is wrong with them shows here, before Ray starts.

    Raises:
        ConfigError: captions are to be rewritten, and the key is missing or the source brings its own.
        CorpusError: the input has no table, a column is missing, or too many rows are bad as they stand.
        EndpointError: the language model that is to rewrite captions cannot be used.
        OntologyError: the disease tree is malformed.
        StorageError: the input cannot be read.
    """
    raw = READERS[config.source](SourceRequest(config.input, config.table, config.columns, config.limit))
    ontology = raw.ontology or _flat_ontology(raw)
    plan = plan_shards(raw, split=config.split, seed=config.seed, rows_per_shard=config.rows_per_shard)
    print(_announce(config, plan), flush=True)
    _check_ceiling(config, plan, plan.dropped)
    # A model is asked only once the table has turned out to be sound.
    raw, rewritten = rewrite_captions(raw, config.rewrite, output=config.output)
    if rewritten:
        plan = plan_shards(raw, split=config.split, seed=config.seed, rows_per_shard=config.rows_per_shard)
    return Work(plan, ontology, _captions_from(config, raw), rewritten)


def prepare(config: PrepareConfig, work: Work | None = None) -> PrepareResult:
    """Prepare a corpus on the connected Ray cluster; run again, it goes on where it was.

    Raises:
        CorpusError: as `read`; or no image is usable, or more rows are bad than `max_dropped_fraction` allows.
        OntologyError: the disease tree is malformed.
        StorageError: the input or the output fails for good.
    """
    started = time.monotonic()
    work = work or read(config)
    plan, ontology = work.plan, work.ontology
    dropped = list(plan.dropped)
    records: list[ShardRecord] = []
    num_made = 0
    for record, made in _run(config, plan, ShardMaker(config, ontology)):
        records.append(record)
        num_made += made
        dropped.extend(record.dropped)
        _check_ceiling(config, plan, dropped)
    manifest, stats, unchanged = _commit(config, work, records)
    return PrepareResult(
        output=config.output,
        manifest=manifest,
        stats=stats,
        num_shards_made=num_made,
        num_shards_found=len(records) - num_made,
        seconds=time.monotonic() - started,
        unchanged=unchanged,
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


def _flat_ontology(raw: RawRows) -> Ontology:
    """A tree of one level over a source's labels, for sources that publish none."""
    labels = raw.table["labels"].combine_chunks().flatten().unique().to_pylist()
    return Ontology.flat(labels)


def _announce(config: PrepareConfig, plan: Plan) -> str:
    images = Counter[str]()
    for spec in plan.shards:
        images[spec.split] += len(set(spec.rows["image"].to_pylist()))
    splits = ", ".join(f"{split} {count:,}" for split, count in images.items()) or "none"
    return (
        f"prepare: {plan.num_rows:,} rows of {config.source}, {plan.num_images:,} images ({splits}) "
        f"in {len(plan.shards):,} shards"
    )


def _run(config: PrepareConfig, plan: Plan, maker: ShardMaker) -> Iterator[tuple[ShardRecord, bool]]:
    """The Ray Data graph: one item and one task a shard; records in the order in which they are done."""
    counter = _ImageCounter.remote()  # type: ignore[attr-defined]
    shards = ray.data.from_items([_packed(spec) for spec in plan.shards], override_num_blocks=len(plan.shards)).map(
        _make_shard,
        fn_kwargs={"maker": maker, "counter": counter},
        num_cpus=config.cpus_per_task,
        concurrency=config.max_tasks,
    )
    progress = Progress(
        num_shards=len(plan.shards),
        num_images=plan.num_images,
        images_done=lambda: ray.get(counter.total.remote()),
    )
    with progress:
        for answer in shards.iter_rows():
            progress.shards_done += 1
            yield _unpacked(answer)


def _packed(spec: ShardSpec) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, spec.rows.schema) as writer:
        writer.write_table(spec.rows)
    return {"split": spec.split, "index": spec.index, "rows": sink.getvalue().to_pybytes()}


def _make_shard(item: dict[str, Any], *, maker: ShardMaker, counter: Any) -> dict[str, Any]:
    """Ray's side of a shard: unpack, make, pack. A full disk or a failing store is an answer, not a lost task."""
    spec = ShardSpec(item["split"], item["index"], pa.ipc.open_stream(item["rows"]).read_all())
    # The cores are shared out by Ray; OpenCV would take them all for each task.
    cv2.setNumThreads(1)
    try:
        record, made = maker.make(spec, on_images=counter.add.remote)
    except (DermRayError, OSError) as error:
        return {"record": "", "made": False, "error": f"shard {spec.name}: {error}"}
    return {"record": json.dumps(record.to_json()), "made": made, "error": ""}


def _unpacked(answer: dict[str, Any]) -> tuple[ShardRecord, bool]:
    if answer["error"]:
        raise StorageError(f"{answer['error']}; finished shards are kept: run the same command again to go on")
    return ShardRecord.from_json(json.loads(answer["record"])), answer["made"]


@ray.remote(num_cpus=0)
class _ImageCounter:
    """Images done, over all tasks."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count

    def total(self) -> int:
        return self._total


def _check_ceiling(config: PrepareConfig, plan: Plan, dropped: Sequence[DroppedRow]) -> None:
    """Stop while it is cheap when too much of the table is bad; finished shards stay for the next run."""
    bad = [row for row in dropped if row.reason != EXCLUDED]
    allowed = config.max_dropped_fraction * plan.num_rows
    if len(bad) <= allowed and plan.shards:
        return
    uri = storage.join(config.output, report.DROPPED_WHEN_STOPPED)
    report.write_dropped(uri, dropped)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.reasons(bad).items())
    found = f"{len(bad):,} of {plan.num_rows:,} rows are unusable so far ({reasons})"
    if not plan.shards:
        raise CorpusError(f"nothing to prepare from {config.input}: {found}; they are listed in {uri}")
    raise CorpusError(
        f"stopped: {found}, more than max_dropped_fraction={config.max_dropped_fraction:g} allows; they are listed in "
        f"{uri}; mend the input or raise the limit and run again"
    )


def _commit(config: PrepareConfig, work: Work, records: Sequence[ShardRecord]) -> tuple[Manifest, dict[str, Any], bool]:
    """Write ontology and report, then the manifest that makes the corpus exist, then remove what it does not name."""
    plan, ontology = work.plan, work.ontology
    place = {spec.name: number for number, spec in enumerate(plan.shards)}
    records = sorted(records, key=lambda record: place[record.key.rpartition("-")[0]])
    shards = tuple(record.shard for record in records if record.shard is not None)
    tree = (json.dumps(ontology.to_json(), indent=2, ensure_ascii=False) + "\n").encode()
    manifest = Manifest(
        shards=shards,
        ontology_sha256=hashlib.sha256(tree).hexdigest(),
        provenance={
            "config": config.content(),
            "captions": dict(work.captions_from),
            "made_by": made_by(),
        },
    )
    stats = report.summarise(plan, records, manifest, ontology)
    if work.rewritten:
        stats["rewritten"] = [done.to_json() for done in work.rewritten]
    if not shards:
        uri = storage.join(config.output, report.DROPPED_WHEN_STOPPED)
        report.write_dropped(uri, report.all_dropped(plan, records))
        raise CorpusError(f"no image of {config.input} is usable; the reasons are listed in {uri}")
    if _is_committed(config.output, manifest, stats):
        return manifest, stats, True
    storage.write_bytes(storage.join(config.output, ONTOLOGY_NAME), tree)
    report.write(config, plan, records, manifest, stats)
    manifest.save(config.output)
    _remove_unnamed(config.output, {record.key for record in records})
    return manifest, stats, False


def _is_committed(output: str, manifest: Manifest, stats: dict[str, Any]) -> bool:
    try:
        return Manifest.load(output) == manifest and storage.read_json(storage.join(output, report.STATS)) == stats
    except (CorpusError, FileNotFoundError):
        return False


def _remove_unnamed(output: str, keys: Collection[str]) -> None:
    """Remove what earlier runs with other settings, and crashes, have left beside the committed shards."""
    for folder, ending in ((DATA, ".parquet"), (RECORDS, ".json")):
        for uri in storage.list_files(storage.join(output, folder)):
            if storage.name_of(uri).removesuffix(ending) not in keys:
                storage.remove(uri)
    storage.remove(storage.join(output, report.DROPPED_WHEN_STOPPED))
