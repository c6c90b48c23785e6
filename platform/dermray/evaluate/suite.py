"""The suite: read the samples, encode everything once, run each task, report."""

from __future__ import annotations

import time

from dermray import models
from dermray.corpus.manifest import Manifest
from dermray.errors import EvaluationError
from dermray.evaluate import features
from dermray.evaluate.features import Say
from dermray.evaluate.report import Report, build
from dermray.evaluate.retrieval import Retrieval
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks import Context, Task, TaskResult
from dermray.evaluate.zero_shot import ZeroShot

TASKS: dict[str, Task] = {"zero_shot": ZeroShot(), "retrieval": Retrieval()}


def check_inputs(config: EvaluateConfig, *, model_uri: str | None = None) -> None:
    """Refuse a missing corpus, split or model before a cluster is started for them.

    Raises:
        CorpusError: no corpus at `config.corpus`, or no such split in it.
        ModelError: no model at `model_uri`.
    """
    Manifest.load(config.corpus).select(config.split)
    models.architecture(model_uri or config.model)


def evaluate(config: EvaluateConfig, *, model_uri: str | None = None, say: Say = lambda line: None) -> Report:
    """Score a model on a split of a prepared corpus, on the connected Ray cluster.

    Args:
        config: what to score and how; nothing is written to `config.output` before `Report.save`.
        model_uri: the folder that `config.model` stands for; empty: `config.model` itself.
        say: takes lines of progress.

    Raises:
        CorpusError, ModelError: the inputs are not there or damaged.
        EvaluationError: a task cannot be scored; the message names the task and says why.
    """
    uri = model_uri or config.model
    check_inputs(config, model_uri=uri)
    began = time.monotonic()
    samples = Samples.load(config.corpus, config.split, max_samples=config.max_samples)
    wanted = [text for name in config.tasks for text in TASKS[name].texts(samples, config)]
    vectors = features.compute(
        samples,
        wanted,
        model_uri=uri,
        batch_size=config.batch_size,
        precision=config.precision,
        num_actors=config.num_actors,
        say=say,
    )
    context = Context(config, samples, vectors)
    results: dict[str, TaskResult] = {name: _run(name, context, say) for name in config.tasks}
    return build(context, results, model_uri=uri, duration_s=time.monotonic() - began)


def _run(name: str, context: Context, say: Say) -> TaskResult:
    say(f"scoring {name}")
    try:
        return TASKS[name].run(context)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error
