"""Prepare a corpus for training: `python jobs/prepare.py --config FILE source=NAME input=URI output=URI`.

With `--dry-run` it reads the table, says what would come of it and which labels name no node, and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dermray import cluster, entry, ledger, storage
from dermray.config import load
from dermray.prepare.settings import PrepareConfig

DRY_RUN = "--dry-run"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = load(
        PrepareConfig,
        [argument for argument in arguments if argument != DRY_RUN],
        prog="jobs/prepare.py",
        description="Turn a raw corpus into Parquet shards with Ray Data. The same command again goes on. "
        "With --dry-run it only reads the table and says what would come of it.",
    )
    return look(config) if DRY_RUN in arguments else run(config)


def look(config: PrepareConfig) -> int:
    """Say what the table holds and would come to; no cluster, nothing written, no language model asked."""
    from dermray.prepare import report
    from dermray.prepare.pipeline import look
    from dermray.raw.sources import OF_FILES

    work = look(config)
    named = report.reasons_in_words(work.plan.dropped, by_name=config.source in OF_FILES)
    print(f"dry run: {work.plan.num_images:,} images to look at, rows dropped before that: {named}; nothing is written")
    return 0


def run(config: PrepareConfig) -> int:
    """Prepare inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("prepare", f"reading {config.input}")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: PrepareConfig) -> int:
    """Prepare under an MLflow run and say what came of it."""
    from dermray import tracking
    from dermray.corpus import licences
    from dermray.prepare.pipeline import prepare, read

    entry.warn(config.without_effect())
    work = read(config)
    cluster.connect(config.cluster)
    name = config.run_name or f"prepare {config.source} {storage.name_of(config.output)}"
    with tracking.run(config.tracking, kind="prepare", name=name, resolved=config) as current:
        result = prepare(config, work)
        rows = result.stats["rows"]
        current.log_corpus(result.output, result.manifest, context="output")
        current.log_artifact("input", "raw", config.input, result.manifest.source_digest)
        for table in result.tables:
            current.log_artifact("input", "table", table.uri, table.sha256)
        current.set_tags({"licence": ", ".join(name or "not stated" for name in licences.of_corpus(result.manifest))})
        current.log_metrics(result.metrics())
        current.log_folder(result.report_uri.rpartition("/")[0], "report")
    if result.unchanged:
        print(f"unchanged: {result.output} holds these {result.manifest.num_samples:,} samples already")
    else:
        print(
            f"prepared {result.manifest.num_samples:,} samples with {result.stats['pairs']:,} captions in "
            f"{result.seconds:.0f} s; {rows['dropped']:,} of {rows['in']:,} rows dropped"
            f"{': ' + result.dropped if rows['dropped'] else ''}; "
            f"{result.num_shards_made} shards made, {result.num_shards_found} found finished"
        )
    print(f"corpus: {result.output} (digest {result.manifest.digest[:12]})")
    print(f"report: {result.report_uri}")
    return 0
