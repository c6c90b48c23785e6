"""Export a prepared corpus: `python jobs/export.py corpus=URI output=URI format=NAME`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dermray import cluster, entry, ledger, storage
from dermray.config import load
from dermray.corpus.accounts import told_in_words
from dermray.export.settings import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        ExportConfig,
        argv,
        prog="jobs/export.py",
        description="Write a prepared corpus in the layout of other programs with Ray Data. "
        "The same command again goes on.",
    )
    return run(config)


def run(config: ExportConfig) -> int:
    """Export inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("export", f"reading {config.corpus}")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: ExportConfig) -> int:
    """Export under an MLflow run and say what came of it."""
    from dermray import tracking
    from dermray.corpus import branches
    from dermray.export.manifest import EXPORT_NAME
    from dermray.export.parts import NOT_CARRIED
    from dermray.export.pipeline import export
    from dermray.export.work import begin, plan

    work = plan(config)
    entry.warn([*config.without_effect(), *work.left_out, *branches.told_of_old(config.corpus)])
    found = begin(work)
    if len(found) < len(work.parts):
        cluster.connect(config.cluster)
    name = config.run_name or f"export {storage.name_of(config.corpus)} as {config.format}"
    with tracking.run(config.tracking, kind="export", name=name, resolved=config) as current:
        current.log_corpus(config.corpus, work.corpus, context="export")
        result = export(work, found)
        current.log_artifact(
            "output", "export", result.output, storage.sha256(storage.join(result.output, EXPORT_NAME))
        )
        current.log_metrics(result.metrics())
        current.log_text(result.manifest.model_dump_json(indent=2, exclude_none=True), "export.json")
    totals = result.totals
    if result.unchanged:
        print(f"unchanged: {result.output} holds these {totals['samples']:,} samples already")
    else:
        print(
            f"exported {totals['samples']:,} samples with {totals['captions']:,} captions in {result.seconds:.0f} s; "
            f"{result.num_parts_written} parts written, {result.num_parts_found} found finished"
        )
    if result.manifest.samples:
        print(f"exported: {told_in_words(result.manifest.samples)}")
    if carried := (result.manifest.side_tables or {}).get("carried"):
        print(f"side tables carried as sides.TABLE.COLUMN: {', '.join(carried)}")
    if totals["samples_without_caption"]:
        print(f"without a caption of {', '.join(config.aspects)}: {totals['samples_without_caption']:,} samples")
    if lost := result.counted(NOT_CARRIED):
        fields = ", ".join(f"{name} of {count:,} samples" for name, count in lost.items())
        print(f"format={config.format} has no place, or no whole one, for: {fields}")
    if asked := result.counted("asked."):
        print(
            f"question-answer pairs: {_in_words(asked)}; samples not asked: {_in_words(result.counted('not_asked.'))}"
        )
    print(f"export: {result.output}")
    return 0


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
