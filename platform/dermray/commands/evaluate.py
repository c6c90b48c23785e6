"""Score a model on a prepared corpus, a published benchmark or a table of one's own.

`python jobs/evaluate.py model=URI corpus=URI output=URI`, or `benchmark=derm1m data=FOLDER`, or `data=TABLE.csv`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dermray import entry, ledger, storage
from dermray.config import load
from dermray.evaluate.settings import EvaluateConfig

DESCRIPTION = (
    "Zero-shot classification, concepts, retrieval, linear probes and few-shot learning, with intervals and beside "
    "published scores; writes report.json and report.html."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    return run(load(EvaluateConfig, argv, prog="jobs/evaluate.py", description=DESCRIPTION))


def run(config: EvaluateConfig) -> int:
    """Evaluate inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("evaluate", "loading torch and the model")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: EvaluateConfig) -> int:
    """Evaluate under an MLflow run, save the report, print the headline."""
    from dermray import cluster, tracking
    from dermray.evaluate import suite
    from dermray.evaluate.report import HTML_NAME, JSON_NAME

    model = tracking.resolve_model(config.model, config.tracking)
    suite.check_inputs(config, model_uri=model.folder_uri)
    entry.warn(config.without_effect())
    cluster.connect(config.cluster)
    target = config.benchmark or storage.name_of(config.corpus or config.data or "")
    name = config.run_name or f"evaluate {model.name} on {target}"
    with tracking.run(config.tracking, kind="evaluate", name=name, resolved=config) as current:
        report = suite.evaluate(config, model_uri=model.folder_uri, say=_say)
        report.save(config.output)
        tracking.log_evaluation(current, report.scored, report.document["model"], config.output, JSON_NAME)
        current.log_metrics(report.metrics())
        current.log_folder(config.output, "report")
    for line in report.headline():
        _say(line)
    _say(f"report: {storage.join(storage.normalise(config.output), HTML_NAME)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
