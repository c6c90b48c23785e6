"""Set several evaluations side by side: `python jobs/compare.py reports=[URI,URI] output=URI`."""

from __future__ import annotations

from collections.abc import Sequence

from dermray import entry, ledger, storage
from dermray.config import load
from dermray.evaluate.settings import CompareConfig

DESCRIPTION = (
    "Differences of models that were evaluated on the same samples, with paired 95 % intervals and p-values; writes "
    "comparison.json and comparison.html."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    return run(load(CompareConfig, argv, prog="jobs/compare.py", description=DESCRIPTION))


def run(config: CompareConfig) -> int:
    """Compare inside a claim of the output: a second run is refused before MLflow knows of it."""
    entry.begin("compare", "reading the reports")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: CompareConfig) -> int:
    """Compare under an MLflow run, save the pages, print the headline."""
    from dermray import tracking
    from dermray.evaluate.comparison import HTML_NAME
    from dermray.evaluate.comparison import run as compare

    name = config.run_name or f"compare {' and '.join(storage.name_of(uri) for uri in config.reports)}"
    with tracking.run(config.tracking, kind="compare", name=name, resolved=config) as current:
        found = compare(config)
        found.save(config.output)
        for uri in config.reports:
            current.log_artifact("input", "report", uri, storage.sha256(storage.join(uri, "report.json")))
        current.log_metrics(found.metrics())
        current.log_folder(config.output, "comparison")
    for line in found.headline():
        print(line)
    print(f"comparison: {storage.join(storage.normalise(config.output), HTML_NAME)}")
    return 0
