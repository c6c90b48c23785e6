"""Prepared corpus → export: the graph, top to bottom.

    plan the parts ─▶ Ray Data: one item a part ─ map: write the part ─▶ records ─ manifest

Each task streams the row groups of its samples and writes one file, or one folder of images. The manifest is written
last; whatever happens before may be lost or repeated without a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray.data

from dermray import cluster
from dermray.errors import DermRayError, StorageError
from dermray.export.manifest import ExportManifest, PartRecord
from dermray.export.parts import CAPTIONS, SAMPLES, UNCAPTIONED, Part
from dermray.export.work import Work, commit


@dataclass(frozen=True)
class ExportResult:
    """What a run came to. `unchanged` says that the export was there already, as it would be now."""

    output: str
    manifest: ExportManifest
    num_parts_written: int
    num_parts_found: int
    seconds: float
    unchanged: bool

    @property
    def totals(self) -> dict[str, int]:
        """Samples, captions, and samples without a caption, over all splits."""
        counts = self.manifest.splits.values()
        return {name: sum(each[name] for each in counts) for name in (SAMPLES, CAPTIONS, UNCAPTIONED)}

    def metrics(self) -> dict[str, float]:
        """Figures of the run, for tracking."""
        return {
            **self.totals,
            "bytes": sum(file.num_bytes for file in self.manifest.files),
            "parts_written": self.num_parts_written,
            "parts_found": self.num_parts_found,
            "seconds": self.seconds,
        }


def export(work: Work, found: Mapping[Part, PartRecord]) -> ExportResult:
    """Write the parts that `work.begin` has not found, on the connected Ray cluster, and commit the export.

    Raises:
        StorageError: the corpus is damaged, or it or the output fails for good.
    """
    started = time.monotonic()
    missing = [part for part in work.parts if part not in found]
    if missing:
        print(f"export: {len(missing):,} of {len(work.parts):,} parts to write", flush=True)
    manifest, unchanged = commit(work, {**found, **dict(_run(work, missing))})
    return ExportResult(
        output=work.config.output,
        manifest=manifest,
        num_parts_written=len(missing),
        num_parts_found=len(found),
        seconds=time.monotonic() - started,
        unchanged=unchanged and not missing,
    )


def _run(work: Work, parts: list[Part]) -> Iterator[tuple[Part, PartRecord]]:
    """The Ray Data graph: one item and one task a part; records in the order in which they are done."""
    if not parts:
        return
    numbers = {part: number for number, part in enumerate(work.parts)}
    answers = ray.data.from_items([{"part": numbers[part]} for part in parts], override_num_blocks=len(parts)).map(
        _write_part,
        fn_kwargs={"work": work},
        num_cpus=cluster.cpus_of_cores(work.config.cpus_per_task),
        concurrency=work.config.max_tasks,
    )
    for done, answer in enumerate(answers.iter_rows(), start=1):
        if answer["error"]:
            raise StorageError(f"{answer['error']}; written parts are kept: run the same command again to go on")
        print(f"export: {done:,}/{len(parts):,} parts", flush=True)
        yield work.parts[answer["part"]], PartRecord.model_validate_json(answer["record"])


def _write_part(item: dict[str, Any], *, work: Work) -> dict[str, Any]:
    """Ray's side of a part. A full disk or a damaged shard is an answer, not a lost task."""
    part = work.parts[item["part"]]
    try:
        record = work.write(part)
    except (DermRayError, OSError) as error:
        return {"part": item["part"], "record": "", "error": f"{part.name}: {error}"}
    return {"part": item["part"], "record": record.model_dump_json(), "error": ""}
