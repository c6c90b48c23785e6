"""The contract of evaluation tasks: one suite, run against every one of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from dermray.errors import EvaluationError
from dermray.evaluate.bootstrap import Metric
from dermray.evaluate.probing import Labelled
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig, TaskName
from dermray.evaluate.suite import TASKS
from dermray.evaluate.tasks import Context
from tests.corpora import write_prepared_corpus
from tests.evaluation import features_of

NUM_SCORED, BROKEN, UNLABELLED = 40, [6], [3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("contract") / "corpus"
    write_prepared_corpus(
        folder, {"train": 80, "val": NUM_SCORED}, broken=BROKEN, unlabelled=UNLABELLED, without_raw=[8]
    )
    return str(folder)


def context_of(corpus: str, name: str, **settings: object) -> Context:
    settings = {"bootstrap": 50, "num_draws": 2, "shots": (1, 5), "label_fractions": (0.1, 1.0)} | settings
    config = EvaluateConfig(model="m", corpus=corpus, output="o", tasks=(name,), **settings)  # type: ignore[arg-type]
    samples, train = Samples.load(corpus, "val"), Samples.load(corpus, "train")
    features = features_of(samples, TASKS[name].texts(samples, config), broken=BROKEN)
    training = (train, features_of(train, [])) if TASKS[name].needs_training else None
    return Context(config, samples, features, training)


@pytest.fixture(params=sorted(TASKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_registry_and_the_configuration_name_the_same_tasks() -> None:
    assert set(get_args(TaskName)) == set(TASKS)


def test_scores_are_finite_and_inside_their_intervals(corpus: str, name: str) -> None:
    result = TASKS[name].run(context_of(corpus, name))
    assert result.metrics
    assert set(result.headline) <= set(result.metrics)
    assert 1 <= len(result.headline) <= 3
    for key, metric in result.metrics.items():
        assert isinstance(metric, Metric)
        assert np.isfinite(metric.value), key
        assert metric.low is not None, key
        assert metric.high is not None, key
        assert metric.low <= metric.high, key
    assert result.metrics[result.headline[0]].value > 0.05


def test_every_sample_is_scored_or_counted(corpus: str, name: str) -> None:
    result = TASKS[name].run(context_of(corpus, name))
    assert result.num_samples + sum(result.excluded.values()) == NUM_SCORED
    assert result.excluded["image not readable"] == len(BROKEN)


def test_the_same_twice_and_without_intervals_the_same_points(corpus: str, name: str) -> None:
    result = TASKS[name].run(context_of(corpus, name))
    assert TASKS[name].run(context_of(corpus, name)).metrics == result.metrics
    points = TASKS[name].run(context_of(corpus, name, bootstrap=0)).metrics
    assert {key: metric.value for key, metric in points.items()} == {
        key: metric.value for key, metric in result.metrics.items()
    }


def test_texts_are_asked_for_in_advance(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    texts = TASKS[name].texts(context.samples, context.config)
    assert all(isinstance(text, str) and text for text in texts)
    assert texts == TASKS[name].texts(context.samples, context.config)


def test_nothing_readable_is_an_error(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    features = replace(context.features, reasons=np.full(NUM_SCORED, "missing", dtype=object))
    with pytest.raises(EvaluationError):
        TASKS[name].run(replace(context, features=features))


def test_vectors_that_are_not_finite_are_refused(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    images = context.features.images.copy()
    images[4] = np.nan
    with pytest.raises(EvaluationError, match="not finite"):
        TASKS[name].run(replace(context, features=replace(context.features, images=images)))


@pytest.mark.parametrize("classifier", ["zero_shot", "linear_probe", "knn", "few_shot"])
def test_a_split_of_one_class_is_refused_and_a_class_without_sample_left_out(corpus: str, classifier: str) -> None:
    def relabelled(labels: list[list[str]]) -> Context:
        context = context_of(corpus, classifier)
        samples = replace(context.samples, labels=labels, class_names=("melanoma", "nevus", "psoriasis"))
        texts = TASKS["zero_shot"].texts(samples, context.config)
        return replace(context, samples=samples, features=features_of(samples, texts))

    with pytest.raises(EvaluationError, match="scores between classes need at least two"):
        TASKS[classifier].run(relabelled([["nevus"]] * NUM_SCORED))
    result = TASKS[classifier].run(relabelled([[("nevus", "melanoma")[row % 2]] for row in range(NUM_SCORED)]))
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())
    if "classes" in result.details:
        (absent,) = (row for row in result.details["classes"] if row["name"] == "psoriasis")
        assert absent["num_samples"] == 0
        assert absent["recall"] is None
        assert absent["auroc"] is None


def test_the_report_shows_it(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    result = TASKS[name].run(context)
    report = build(context, {name: result}, model_uri="m", duration_s=1.0)
    section = json.loads(json.dumps(report.document, allow_nan=False))["tasks"][name]
    assert section["num_samples"] == result.num_samples
    assert report.metrics()[f"{name}/{result.headline[0].replace('@', '_at_')}"] == pytest.approx(
        result.metrics[result.headline[0]].value
    )
    assert report.headline()[0].startswith(f"{name} ({result.num_samples} samples): {result.headline[0]} ")
    assert f"{result.num_samples} samples scored" in report.html
    assert "<svg" in report.html or "<table" in report.html


def test_only_learning_tasks_need_a_training_split() -> None:
    assert {name for name, task in TASKS.items() if task.needs_training} == {"linear_probe", "knn", "few_shot"}


def test_samples_after_others(corpus: str) -> None:
    scored, train = Samples.load(corpus, "val"), Samples.load(corpus, "train")
    together = scored.followed_by(train)
    assert len(together) == NUM_SCORED + 80
    assert [unit.position for unit in together.images] == sorted(unit.position for unit in together.images)
    assert together.images[-1].position + together.images[-1].num_rows == len(together)
    assert together.read_images([0, NUM_SCORED])[NUM_SCORED] == train.read_images([0])[0]


def test_probes_take_vectors_in_the_length_the_tower_gives_them(corpus: str) -> None:
    context = context_of(corpus, "linear_probe")
    assert context.training is not None
    samples, features = context.training
    longer = replace(context.features, lengths=5.0 * context.features.lengths)
    stretched = replace(context, features=longer, training=(samples, replace(features, lengths=5.0 * features.lengths)))
    # The longer the vectors, the less the penalty on the weights holds the probe back.
    rows = np.arange(79)
    before, after = (Labelled.of(one).probe(rows, seed=0).max(axis=1).mean() for one in (context, stretched))
    assert after > before + 0.01
    votes = [TASKS["knn"].run(one).metrics for one in (context, stretched)]
    assert votes[0] == votes[1]
