"""The suite: find the samples, encode everything once, run each task, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from dermray import models
from dermray.corpus.accounts import require_balance
from dermray.errors import EvaluationError
from dermray.evaluate import cases, features
from dermray.evaluate.cases import Case, Skipped
from dermray.evaluate.leakage import Leakage, training_digest_of, training_split_of
from dermray.evaluate.predictions import OwnPredictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.predictors.contract import ImagePredictor
from dermray.evaluate.report import Report, SuiteReport, build, summarise
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks.contract import Context, TaskResult, require_sound, scorer
from dermray.progress import Say, busy
from dermray.vectors.encoder_info import EncoderInfo


def check_inputs(config: EvaluateConfig, *, model_uri: str | None = None) -> None:
    """Refuse a missing corpus, table, split, model or module of a task before a cluster is started for them.

    Raises:
        ConfigError: no benchmark of that name.
        CorpusError: the corpus, the table or its split is not there, or none of a benchmark's data sets.
        ModelError: no model at `model_uri`.
        EvaluationError: no report of jobs/leakage.py at `config.leakage`, or a task or predictor cannot be imported.
    """
    for name in config.tasks:
        scorer(name)
        if predictor := config.predictor_of(name):
            predictors.load(predictor)
    if config.leakage is not None:
        Leakage.load(config.leakage)
    found = cases.of_suite(config)[1] if config.benchmark is not None else [cases.of_config(config)]
    uri = model_uri or config.model
    for tasks in {case.tasks: None for case in found if isinstance(case, Case)}:
        if config.sees_vectors(tasks):
            models.described(uri)
        else:
            _info(config, tasks, uri)


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
        case = cases.of_config(config)
        _tell(case, say)
        (report,) = _evaluate([case], config, uri, say)
        if isinstance(report, EvaluationError):
            raise report
        return report
    began = time.monotonic()
    suite, found = cases.of_suite(config)
    skipped = [one for one in found if isinstance(one, Skipped)]
    present = {one.benchmark.name: one for one in found if isinstance(one, Case) and one.benchmark is not None}
    for case in present.values():
        _tell(case, say)
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


def _tell(case: Case, say: Say) -> None:
    for line in case.told:
        say(line)


def _evaluate(found: Sequence[Case], config: EvaluateConfig, uri: str, say: Say) -> Iterator[Report | EvaluationError]:
    """A report of each case, or why it cannot be scored; all are encoded in one go."""
    began = time.monotonic()
    leaked = Leakage.load(config.leakage) if config.leakage else None
    if leaked is not None:
        leaked.require_about([case.samples for case in found], training_digest_of(uri), training_split_of(uri))
    texts = [_texts(case) for case in found]
    asked = [
        (case, wanted)
        for case, wanted in zip(found, texts, strict=True)
        if not isinstance(wanted, EvaluationError) and case.config.sees_vectors(case.tasks)
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
        of_case = vectors
        if not case.config.sees_vectors(case.tasks):
            info = _info(case.config, case.tasks, uri)
            of_case = iter([features.Features.none(samples, info) for samples in _splits(case)])
        scored = next(of_case)
        training = (case.training, next(of_case)) if case.training else None
        validation = (case.validation, next(of_case)) if case.validation else None
        config_of_case = case.config.model_copy(update={"tasks": case.tasks})
        samples = leaked.mark(case.samples) if leaked else case.samples
        context = Context(config_of_case, samples, scored, training, validation, models.located(uri))
        try:
            results: dict[str, TaskResult] = {name: _run(name, context, case, say) for name in case.tasks}
        except EvaluationError as error:
            yield error
            continue
        duration_s = time.monotonic() - began
        yield build(context, results, model_uri=uri, duration_s=duration_s, benchmark=case.benchmark, leakage=leaked)


def _info(config: EvaluateConfig, tasks: Sequence[str], uri: str) -> EncoderInfo:
    """What the model is of a run that encodes nothing, by who predicts for the first of its tasks."""
    return cast(ImagePredictor, predictors.load(config.predictor_of(tasks[0]))).info(models.located(uri))


def _splits(case: Case) -> list[Samples]:
    """What is to be encoded, in the order in which the vectors are taken up."""
    return [samples for samples in (case.samples, case.training, case.validation) if samples]


def _texts(case: Case) -> list[str] | EvaluationError:
    """The texts that a case's tasks need, or why its samples do not allow a score."""
    try:
        return [text for name in case.tasks for text in scorer(name).texts(case.samples, case.config)]
    except EvaluationError as error:
        return error


def _run(name: str, context: Context, case: Case, say: Say) -> TaskResult:
    of = f"{case.benchmark.name}: " if case.benchmark else ""
    what = f"scoring {of}{name} (task {case.tasks.index(name) + 1} of {len(case.tasks)})"
    say(what)
    try:
        with busy(what, say):
            result = scorer(name).run(context)
        require_sound(result, len(context.samples))
        if isinstance(result.predictions, OwnPredictions) and not hasattr(scorer(name), "distributions"):
            raise EvaluationError("its SCORER has no distributions() by which two models' predictions are compared")
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error
    require_balance(f"evaluation, {name}", len(context.samples), result.num_samples, result.excluded)
    return replace(result, excluded=result.excluded | context.samples.dropped)
