"""Prepare a corpus for training: `python jobs/prepare.py --config FILE source=NAME input=URI output=URI`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dermray import cluster, entry, storage
from dermray.config import load
from dermray.prepare.settings import PrepareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        PrepareConfig,
        argv,
        prog="jobs/prepare.py",
        description="Turn a raw corpus into Parquet shards with Ray Data. The same command again goes on.",
    )
    return run(config)


def run(config: PrepareConfig) -> int:
    """Prepare under an MLflow run and say what came of it."""
    from dermray import tracking
    from dermray.corpus import licences
    from dermray.prepare.pipeline import prepare, read

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
            f"{result.seconds:.0f} s; {rows['dropped']:,} of {rows['in']:,} rows dropped; "
            f"{result.num_shards_made} shards made, {result.num_shards_found} found finished"
        )
    print(f"corpus: {result.output} (digest {result.manifest.digest[:12]})")
    print(f"report: {result.report_uri}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
