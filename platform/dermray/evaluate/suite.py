"""The suite: find the samples, encode everything once, run each task, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dermray import models
from dermray.embedding.store import Say
from dermray.errors import EvaluationError
from dermray.evaluate import cases, features
from dermray.evaluate.cases import Case, Skipped
from dermray.evaluate.concepts import Concepts
from dermray.evaluate.few_shot import FewShot
from dermray.evaluate.knn import KNearest
from dermray.evaluate.leakage import Leakage
from dermray.evaluate.linear_probe import LinearProbe
from dermray.evaluate.report import Report, SuiteReport, build, summarise
from dermray.evaluate.retrieval import Retrieval
from dermray.evaluate.samples import Samples
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
        EvaluationError: no report of jobs/leakage.py at `config.leakage`.
    """
    if config.leakage is not None:
        Leakage.load(config.leakage)
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
        (report,) = _evaluate([cases.of_config(config)], config, uri, say)
        if isinstance(report, EvaluationError):
            raise report
        return report
    began = time.monotonic()
    suite, found = cases.of_suite(config)
    skipped = [one for one in found if isinstance(one, Skipped)]
    present = {one.benchmark.name: one for one in found if isinstance(one, Case) and one.benchmark is not None}
    reports: dict[str, Report] = {}
    for case, report in zip(present.values(), _evaluate([*present.values()], config, uri, say), strict=True):
        assert case.benchmark is not None
        if isinstance(report, Report):
            reports[case.benchmark.name] = report
        elif len(found) == 1:
            raise report
        else:
            skipped.append(Skipped(case.benchmark, str(report)))
    for one in skipped:
        say(f"skipped {one}")
    return summarise(suite, reports, skipped, config=config, duration_s=time.monotonic() - began)


def _evaluate(found: Sequence[Case], config: EvaluateConfig, uri: str, say: Say) -> Iterator[Report | EvaluationError]:
    """A report of each case, or why it cannot be scored; all are encoded in one go."""
    began = time.monotonic()
    leaked = Leakage.load(config.leakage) if config.leakage else None
    texts = [_texts(case) for case in found]
    asked = [
        (case, wanted) for case, wanted in zip(found, texts, strict=True) if not isinstance(wanted, EvaluationError)
    ]
    vectors = iter(
        features.compute(
            [samples for case, _ in asked for samples in _splits(case)],
            [text for _, wanted in asked for text in wanted],
            model_uri=uri,
            cache=config.cache,
            batch_size=config.batch_size,
            precision=config.precision,
            num_actors=config.num_actors,
            say=say,
        )
        if asked
        else ()
    )
    for case, wanted in zip(found, texts, strict=True):
        if isinstance(wanted, EvaluationError):
            yield wanted
            continue
        scored = next(vectors)
        training = (case.training, next(vectors)) if case.training else None
        validation = (case.validation, next(vectors)) if case.validation else None
        config_of_case = case.config.model_copy(update={"tasks": case.tasks})
        samples = leaked.mark(case.samples) if leaked else case.samples
        context = Context(config_of_case, samples, scored, training, validation)
        try:
            results: dict[str, TaskResult] = {name: _run(name, context, case, say) for name in case.tasks}
        except EvaluationError as error:
            yield error
            continue
        duration_s = time.monotonic() - began
        yield build(context, results, model_uri=uri, duration_s=duration_s, benchmark=case.benchmark, leakage=leaked)


def _splits(case: Case) -> list[Samples]:
    """What is to be encoded, in the order in which the vectors are taken up."""
    return [samples for samples in (case.samples, case.training, case.validation) if samples]


def _texts(case: Case) -> list[str] | EvaluationError:
    """The texts that a case's tasks need, or why its samples do not allow a score."""
    try:
        return [text for name in case.tasks for text in TASKS[name].texts(case.samples, case.config)]
    except EvaluationError as error:
        return error


def _run(name: str, context: Context, case: Case, say: Say) -> TaskResult:
    say(f"scoring {case.benchmark.name + ': ' if case.benchmark else ''}{name}")
    try:
        result = TASKS[name].run(context)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error
    return replace(result, excluded=result.excluded | context.samples.dropped)
