"""Register an evaluated model: `python jobs/register.py model=FOLDER report=FOLDER name=dermlip`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from dermray import entry, storage
from dermray.config import Config, TrackingConfig, load
from dermray.errors import EvaluationError, ModelError
from dermray.progress import busy


class RegisterConfig(Config):
    """Everything `jobs/register.py` can be told."""

    model: str = Field(description="URI of a model folder")
    report: str = Field(description="URI of the evaluation's output (the folder of report.json)")
    name: str = Field("dermray", description="name of the registered model")
    alias: str | None = Field(
        "champion",
        description="alias that moves to this version when it is the best so far; empty, or null: none, "
        "jobs/promote.py decides",
    )
    metric: str | None = Field(
        None,
        description="TASK.METRIC of the report that decides; empty: of the model's kind, zero_shot.accuracy of clip",
    )
    golden: bool = Field(
        True, description="write golden.json into the model folder: vectors and predictions that serving must reproduce"
    )
    run_name: str | None = Field(None, description="name of the run in MLflow; empty: from the model's name")
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("alias")
    @classmethod
    def _none_by_name(cls, alias: str | None) -> str | None:
        # A text key takes its text as it stands, and no alias shall be called so by mistake.
        return None if alias == "null" else alias


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        RegisterConfig,
        argv,
        prog="jobs/register.py",
        description="Register a model in MLflow, and move an alias to it when its report is the best so far.",
    )
    entry.begin("register", "loading torch and the model's settings")
    from dermray import models, tracking
    from dermray.model_uri import LOCAL_PREFIX
    from dermray.models import kinds, layout
    from dermray.release import gate

    models.described(config.model)
    metric = config.metric or kinds.of(config.model).metric
    value, report = read_metric(config.report, metric)
    weights = layout.weights_digest(storage.normalise(config.model.removeprefix(LOCAL_PREFIX)))
    if weights is None:
        raise ModelError(f"{config.model} is no model folder: only a folder with its weights can be registered")
    gate.require_model(gate.load_report(config.report), weights, config.model)
    if config.golden:
        with busy("register: computing golden vectors"):
            write_golden(config.model)
    name = config.run_name or f"register {config.name}"
    with tracking.run(config.tracking, kind="register", name=name, resolved=config) as current:
        done = tracking.register(
            current,
            name=config.name,
            model_uri=storage.normalise(config.model),
            metric=metric,
            value=value,
            corpus_digest=report["corpus"]["digest"],
            alias=config.alias,
            tags={
                **_scoring(report, metric),
                "dermray.weights_sha256": weights,
                "dermray.report_uri": storage.normalise(config.report),
                "dermray.report_sha256": storage.sha256(storage.join(config.report, "report.json")),
            },
        )
        current.log_artifact("input", "model", config.model, weights)
        report_digest = storage.sha256(storage.join(config.report, "report.json"))
        current.log_artifact("input", "report", config.report, report_digest)
    before = "" if done.previous is None else f", before {done.previous:.4f}"
    print(f"registered {done.name} version {done.version}: {metric} {done.value:.4f}{before}")
    if config.alias is not None:
        print(f"models:/{done.name}@{config.alias} {'now is' if done.promoted else 'stays better than'} this version")
        if done.not_compared:
            print(
                f"without a comparison: {done.not_compared}; jobs/promote.py compares reports and takes an alias back"
            )
    return 0


def _scoring(report: Mapping[str, Any], metric: str) -> dict[str, str]:
    """Tags that say which samples a report has scored, and whether less of the score is better."""
    from dermray import scales
    from dermray.tracking.registry import LOWER_TAG

    task, _, key = metric.partition(".")
    scale = scales.of(key, report["tasks"][task]["metrics"][key])
    said = {
        "evaluation_split": report["corpus"].get("split"),
        "evaluation_samples": report["corpus"].get("num_samples"),
    }
    tags = {tag: str(value) for tag, value in said.items() if value is not None}
    return tags | {LOWER_TAG: str(scale.lower_is_better).lower()}


def write_golden(model: str) -> None:
    """Leave in the model folder what the model gives for a few inputs, here and now."""
    from dermray.model_uri import folder_uri
    from dermray.release.golden import Golden
    from dermray.vectors.encoder import Encoder

    folder = folder_uri(model)
    if folder is not None:
        Golden.make(Encoder.load(model)).save(folder)


def read_metric(report_uri: str, metric: str) -> tuple[float, dict[str, Any]]:
    """The value of `TASK.METRIC` in an evaluation's report, and the report.

    Raises:
        EvaluationError: there is no report, or it has no such metric; lists those it has.
    """
    from dermray.evaluate import compare

    report = compare.read_report(report_uri)
    file = storage.join(report_uri, compare.REPORT_NAME)
    task, _, key = metric.partition(".")
    try:
        return float(report["tasks"][task]["metrics"][key]["value"]), report
    except (TypeError, ValueError):
        raise EvaluationError(f"{file} is damaged: the value of {metric} is no number; evaluate again") from None
    except KeyError:
        if "benchmarks" in report:
            names = ", ".join(report["benchmarks"])
            raise EvaluationError(
                f"{file} is that of several data sets ({names}): give the report of one, {report_uri}/NAME"
            ) from None
        known = [f"{t}.{k}" for t, result in report["tasks"].items() for k in result["metrics"]]
        raise EvaluationError(f"{file} has no metric {metric}; it has {', '.join(known)}") from None
