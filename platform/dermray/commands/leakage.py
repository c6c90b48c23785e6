"""Find evaluation images in a training corpus: `python jobs/leakage.py corpus=URI against=[URI,URI] output=URI`."""

from __future__ import annotations

from collections.abc import Sequence

from dermray import entry, ledger, storage
from dermray.audit.leakage_settings import LeakageConfig
from dermray.config import load


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        LeakageConfig,
        argv,
        prog="jobs/leakage.py",
        description="Find samples of evaluation corpora that resemble training samples; writes a report with pictures.",
    )
    return run(config)


def run(config: LeakageConfig) -> int:
    """Search inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("leakage", f"reading {', '.join(config.corpus_uris)}")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: LeakageConfig) -> int:
    """Search under an MLflow run, write the report and say what came of it."""
    from dermray import cluster, tracking
    from dermray.audit import leakage_report
    from dermray.audit.leakage import check_inputs, find_leakage
    from dermray.corpus.manifest import Manifest

    check_inputs(config)
    cluster.connect(config.cluster)
    name = config.run_name or f"leakage {leakage_report.names(config.corpus_uris)}"
    with tracking.run(config.tracking, kind="leakage", name=name, resolved=config) as current:
        leakage = find_leakage(config, say=_say)
        # A run has each data set once, so a training corpus keeps its context when one of its splits is evaluated.
        contexts = {part.uri: "evaluation" for part in config.parts()} | dict.fromkeys(config.corpus_uris, "training")
        for uri, context in contexts.items():
            current.log_corpus(uri, Manifest.load(uri), context=context)
        document = leakage_report.write(config, leakage)
        current.log_metrics(leakage_report.metrics(document))
        current.log_folder(config.output, "report")
    _say(
        f"{document['num_evaluation_samples_found']:,} of {document['num_evaluation_samples']:,} evaluation samples "
        f"resemble {document['training']['num_samples_found']:,} of {document['training']['num_samples']:,} training "
        f"samples within {config.max_distance} bits"
    )
    _say(f"report: {storage.join(config.output, leakage_report.HTML)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
