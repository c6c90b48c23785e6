"""Register an evaluated model: `python jobs/register.py model=FOLDER report=FOLDER name=dermlip`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dermray import entry, storage
from dermray.config import Config, TrackingConfig, load
from dermray.errors import EvaluationError


class RegisterConfig(Config):
    """Everything `jobs/register.py` can be told."""

    model: str = Field(description="URI of a model folder")
    report: str = Field(description="URI of the evaluation's output (the folder of report.json)")
    name: str = Field("dermray", description="name of the registered model")
    alias: str | None = Field(
        "champion",
        description="alias that moves to this version when it is the best so far; null: none, jobs/promote.py decides",
    )
    metric: str = Field("zero_shot.accuracy", description="TASK.METRIC of the report that decides")
    golden: bool = Field(
        True, description="write golden.json into the model folder: vectors that serving must reproduce"
    )
    run_name: str | None = Field(None, description="name of the run in MLflow; empty: from the model's name")
    tracking: TrackingConfig = TrackingConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        RegisterConfig,
        argv,
        prog="jobs/register.py",
        description="Register a model in MLflow, and move an alias to it when its report is the best so far.",
    )
    from dermray import models, tracking

    models.architecture(config.model)
    value, report = read_metric(config.report, config.metric)
    if config.golden:
        write_golden(config.model)
    name = config.run_name or f"register {config.name}"
    with tracking.run(config.tracking, kind="register", name=name, resolved=config) as current:
        done = tracking.register(
            current,
            name=config.name,
            model_uri=storage.normalise(config.model),
            metric=config.metric,
            value=value,
            corpus_digest=report["corpus"]["digest"],
            alias=config.alias,
            tags={
                "dermray.report_uri": storage.normalise(config.report),
                "dermray.report_sha256": storage.sha256(storage.join(config.report, "report.json")),
            },
        )
        facts = tracking.model_facts(storage.normalise(config.model))
        if "dermray.weights_sha256" in facts:
            current.log_artifact("input", "model", config.model, facts["dermray.weights_sha256"])
        report_digest = storage.sha256(storage.join(config.report, "report.json"))
        current.log_artifact("input", "report", config.report, report_digest)
    before = "" if done.previous is None else f", before {done.previous:.4f}"
    print(f"registered {done.name} version {done.version}: {config.metric} {done.value:.4f}{before}")
    if config.alias is not None:
        print(f"models:/{done.name}@{config.alias} {'now is' if done.promoted else 'stays better than'} this version")
    return 0


def write_golden(model: str) -> None:
    """Leave in the model folder what the model gives for a few inputs, here and now."""
    from dermray.encoder import Encoder
    from dermray.model_uri import folder_uri
    from dermray.serving.gate import Golden

    folder = folder_uri(model)
    if folder is not None:
        Golden.make(Encoder.load(model)).save(folder)


def read_metric(report_uri: str, metric: str) -> tuple[float, dict[str, Any]]:
    """The value of `TASK.METRIC` in an evaluation's report, and the report.

    Raises:
        EvaluationError: there is no report, or it has no such metric; lists those it has.
    """
    file = storage.join(report_uri, "report.json")
    try:
        report = storage.read_json(file)
    except FileNotFoundError:
        raise EvaluationError(f"{file} does not exist; run jobs/evaluate.py with output={report_uri}") from None
    task, _, key = metric.partition(".")
    try:
        return float(report["tasks"][task]["metrics"][key]["value"]), report
    except KeyError:
        known = [f"{t}.{k}" for t, result in report["tasks"].items() for k in result["metrics"]]
        raise EvaluationError(f"{file} has no metric {metric}; it has {', '.join(known)}") from None


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
