"""The suite: find the samples, encode everything once, run each task, report."""

from __future__ import annotations

import time
from dataclasses import replace

from dermray import models
from dermray.errors import CorpusError, EvaluationError
from dermray.evaluate import cases, features
from dermray.evaluate.cases import Case, Skipped
from dermray.evaluate.concepts import Concepts
from dermray.evaluate.features import Say
from dermray.evaluate.few_shot import FewShot
from dermray.evaluate.knn import KNearest
from dermray.evaluate.linear_probe import LinearProbe
from dermray.evaluate.report import Report, SuiteReport, build, summarise
from dermray.evaluate.retrieval import Retrieval
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks import Context, Task, TaskResult
from dermray.evaluate.zero_shot import ZeroShot

TASKS: dict[str, Task] = {
    "zero_shot": ZeroShot(),
    "concepts": Concepts(),
    "retrieval": Retrieval(),
    "linear_probe": LinearProbe(),
    "knn": KNearest(),
    "few_shot": FewShot(),
}


def check_inputs(config: EvaluateConfig, *, model_uri: str | None = None) -> None:
    """Refuse a missing corpus, table, split or model before a cluster is started for them.

    Raises:
        ConfigError: no benchmark of that name.
        CorpusError: the corpus, the table or its split is not there, or none of a benchmark's data sets.
        ModelError: no model at `model_uri`.
    """
    if config.benchmark is not None:
        cases.of_suite(config)
    else:
        cases.of_config(config)
    models.architecture(model_uri or config.model)


def evaluate(
    config: EvaluateConfig, *, model_uri: str | None = None, say: Say = lambda line: None
) -> Report | SuiteReport:
    """Score a model on what the configuration names, on the connected Ray cluster.

    Args:
        config: what to score and how; nothing is written to `config.output` before `save`.
        model_uri: the folder that `config.model` stands for; empty: `config.model` itself.
        say: takes lines of progress.

    Returns:
        A report; for a benchmark one with a report a data set inside.

    Raises:
        CorpusError, ModelError: the inputs are not there or damaged.
        EvaluationError: a task cannot be scored; the message names the task and says why.
    """
    uri = model_uri or config.model
    if config.benchmark is None:
        return _evaluate(cases.of_config(config), uri, say)
    began = time.monotonic()
    suite, found = cases.of_suite(config)
    reports: dict[str, Report] = {}
    skipped: list[Skipped] = []
    for case in found:
        if isinstance(case, Case) and case.benchmark is not None:
            say(f"{case.benchmark.name}: {len(case.samples):,} images")
            try:
                reports[case.benchmark.name] = _evaluate(case, uri, say)
            except (EvaluationError, CorpusError) as error:
                if len(found) == 1:
                    raise
                skipped.append(Skipped(case.benchmark, str(error)))
        elif isinstance(case, Skipped):
            skipped.append(case)
    for one in skipped:
        say(f"skipped {one}")
    return summarise(suite, reports, skipped, config=config, duration_s=time.monotonic() - began)


def _evaluate(case: Case, uri: str, say: Say) -> Report:
    began = time.monotonic()
    config = case.config.model_copy(update={"tasks": case.tasks})
    if case.training is None and any(TASKS[name].needs_training for name in case.tasks):
        raise EvaluationError(f"there is no split {config.train_split!r} to learn from")
    everything = case.samples.followed_by(case.training) if case.training else case.samples
    vectors = features.compute(
        everything,
        [text for name in case.tasks for text in TASKS[name].texts(case.samples, config)],
        model_uri=uri,
        batch_size=config.batch_size,
        precision=config.precision,
        num_actors=config.num_actors,
        say=say,
    )
    num_scored = len(case.samples)
    training = (case.training, vectors.rows(num_scored, len(everything))) if case.training else None
    context = Context(config, case.samples, vectors.rows(0, num_scored), training)
    results: dict[str, TaskResult] = {name: _run(name, context, say) for name in case.tasks}
    return build(context, results, model_uri=uri, duration_s=time.monotonic() - began, benchmark=case.benchmark)


def _run(name: str, context: Context, say: Say) -> TaskResult:
    say(f"scoring {name}")
    try:
        result = TASKS[name].run(context)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error
    return replace(result, excluded=result.excluded | context.samples.dropped)
