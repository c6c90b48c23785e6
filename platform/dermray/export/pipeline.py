"""Prepared corpus → export: the graph, top to bottom.

    plan the parts ─▶ Ray Data: one item a part ─ a pool of workers: write the part ─▶ records ─ manifest

Each worker streams the row groups of its samples and writes one file, or one folder of images. The manifest is written
last; whatever happens before may be lost or repeated without a trace.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from dermray import cluster, interrupts, ledger, pieces
from dermray.errors import DermRayError, StorageError
from dermray.export.manifest import ExportManifest, PartRecord
from dermray.export.parts import CAPTIONS, SAMPLES, UNCAPTIONED, Part
from dermray.export.work import Work, commit
from dermray.progress import Progress

KEPT = "written parts are kept: run the same command again to go on"


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

    def counted(self, prefix: str) -> dict[str, int]:
        """A format's own figures over all splits, by what stands behind a prefix: `asked.tree` of `asked.` → `tree`."""
        found = Counter[str]()
        for counts in self.manifest.splits.values():
            found.update({name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)})
        return dict(found)

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
        ClaimError: another run writes into the output, or has taken it over.
        StorageError: the corpus is damaged, or it or the output fails for good.
    """
    with ledger.claim(work.config.output, wait_s=work.config.wait_for_output_s) as claim:
        return _export(work, found, claim)


def _export(work: Work, found: Mapping[Part, PartRecord], claim: ledger.Claim) -> ExportResult:
    started = time.monotonic()
    missing = [part for part in work.parts if part not in found]
    if missing:
        print(f"export: {len(missing):,} of {len(work.parts):,} parts to write", flush=True)
    with interrupts.telling(lambda: KEPT):
        manifest, unchanged = commit(work, {**found, **dict(_run(work, missing, claim))})
    return ExportResult(
        output=work.config.output,
        manifest=manifest,
        num_parts_written=len(missing),
        num_parts_found=len(found),
        seconds=time.monotonic() - started,
        unchanged=unchanged and not missing,
    )


def _run(work: Work, parts: list[Part], claim: ledger.Claim) -> Iterator[tuple[Part, PartRecord]]:
    """Records of parts in the order in which they are done."""
    if not parts:
        return
    named = {part.name: part for part in parts}
    numbers = {part.name: number for number, part in enumerate(work.parts) if part.name in named}
    pool = pieces.Pool(
        noun="part",
        operator="write_part",
        needs={"CPU": cluster.cpus_of_cores(work.config.cpus_per_task)},
        limit=work.config.max_tasks,
        advice="raise cpus_per_task, lower samples_per_file",
        kept=KEPT,
    )
    cluster.require(pool.of_worker, pool.needs, advice="lower cpus_per_task")
    with Progress("export", len(parts), "parts", waits_for=pool.waits_for()) as progress:
        for name, record in pieces.run(numbers, partial(_write_part, work=work, claim=claim), pool):
            progress.advance()
            yield named[name], record


def _write_part(number: int, *, work: Work, claim: ledger.Claim) -> PartRecord:
    """A worker's side of a part, by its number in the plan."""
    part = work.parts[number]
    try:
        claim.confirm()
        return work.write(part)
    except (DermRayError, OSError) as error:
        raise StorageError(f"{part.name}: {error}; {KEPT}") from None
