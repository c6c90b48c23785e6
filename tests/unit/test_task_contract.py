"""The contract of evaluation tasks: one suite, run against every one of them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from dermray.config import parse
from dermray.errors import ConfigError, EvaluationError
from dermray.evaluate import predictions
from dermray.evaluate.predictors import contract as predictors
from dermray.evaluate.probing import Labelled
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.suite import check_inputs
from dermray.evaluate.tasks import kinds
from dermray.evaluate.tasks.contract import Context, TaskResult, require_sound, scorer
from dermray.release import gate
from dermray.scales import Scale
from tests import centroids
from tests.corpora import write_prepared_corpus
from tests.evaluation import features_of

OWN = "tests.centroids:centroids"
# A task whose keys have an error of their own kind.
PICKY = """
from pydantic import field_validator
from pydantic_core import PydanticCustomError
from dermray.evaluate.tasks.kinds import TaskConfig, TaskKind

class Picky(TaskConfig):
    note: str = ""

    @field_validator("note")
    @classmethod
    def check(cls, note):
        raise PydanticCustomError("odd_note", "the {note} is odd")

task = TaskKind("Picky", "picky", settings=Picky)
"""
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
    features = features_of(samples, scorer(name).texts(samples, config), broken=BROKEN)
    training = (train, features_of(train, [])) if kinds.find(name).learns else None
    return Context(config, samples, features, training)


@pytest.fixture(params=[*kinds.ours(), OWN])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_scores_are_finite_and_inside_their_intervals(corpus: str, name: str) -> None:
    result = scorer(name).run(context_of(corpus, name))
    require_sound(result, NUM_SCORED)
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
    result = scorer(name).run(context_of(corpus, name))
    assert result.num_samples + sum(result.excluded.values()) == NUM_SCORED
    assert result.excluded["image not readable"] == len(BROKEN)


def test_the_same_twice_and_without_intervals_the_same_points(corpus: str, name: str) -> None:
    result = scorer(name).run(context_of(corpus, name))
    assert scorer(name).run(context_of(corpus, name)).metrics == result.metrics
    points = scorer(name).run(context_of(corpus, name, bootstrap=0)).metrics
    assert {key: metric.value for key, metric in points.items()} == {
        key: metric.value for key, metric in result.metrics.items()
    }


def test_texts_are_asked_for_in_advance(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    texts = scorer(name).texts(context.samples, context.config)
    assert all(isinstance(text, str) and text for text in texts)
    assert texts == scorer(name).texts(context.samples, context.config)


def test_nothing_readable_is_an_error(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    features = replace(context.features, reasons=np.full(NUM_SCORED, "missing", dtype=object))
    with pytest.raises(EvaluationError):
        scorer(name).run(replace(context, features=features))


def test_vectors_that_are_not_finite_are_refused(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    images = context.features.images.copy()
    images[4] = np.nan
    with pytest.raises(EvaluationError, match="not finite"):
        scorer(name).run(replace(context, features=replace(context.features, images=images)))


@pytest.mark.parametrize("classifier", ["zero_shot", "linear_probe", "knn", "few_shot"])
def test_a_split_of_one_class_is_refused_and_a_class_without_sample_left_out(corpus: str, classifier: str) -> None:
    def relabelled(labels: list[list[str]]) -> Context:
        context = context_of(corpus, classifier)
        samples = replace(context.samples, labels=labels, class_names=("melanoma", "nevus", "psoriasis"))
        texts = scorer("zero_shot").texts(samples, context.config)
        return replace(context, samples=samples, features=features_of(samples, texts))

    with pytest.raises(EvaluationError, match="scores between classes need at least two"):
        scorer(classifier).run(relabelled([["nevus"]] * NUM_SCORED))
    result = scorer(classifier).run(relabelled([[("nevus", "melanoma")[row % 2]] for row in range(NUM_SCORED)]))
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())
    if "classes" in result.details:
        (absent,) = (row for row in result.details["classes"] if row["name"] == "psoriasis")
        assert absent["num_samples"] == 0
        assert absent["recall"] is None
        assert absent["auroc"] is None


def test_the_report_shows_it(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    result = scorer(name).run(context)
    report = build(context, {name: result}, model_uri="m", duration_s=1.0)
    section = json.loads(json.dumps(report.document, allow_nan=False))["tasks"][kinds.short(name)]
    assert section["num_samples"] == result.num_samples
    assert report.metrics()[f"{kinds.short(name)}/{result.headline[0].replace('@', '_at_')}"] == pytest.approx(
        result.metrics[result.headline[0]].value
    )
    assert report.headline()[0].startswith(f"{kinds.short(name)} ({result.num_samples} samples): {result.headline[0]} ")
    assert f"{result.num_samples} samples scored" in report.html
    assert "<svg" in report.html or "<table" in report.html


def test_only_learning_tasks_need_a_training_split() -> None:
    assert {name for name in kinds.ours() if kinds.find(name).learns} == {"linear_probe", "knn", "few_shot"}


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
    probe = predictors.load("linear_probe")
    before, after = (
        probe.ready(Labelled.of(one).lesson(one, rows))(one.seen(Labelled.of(one).kept)).values.max(axis=1).mean()
        for one in (context, stretched)
    )
    assert after > before + 0.01
    votes = [scorer("knn").run(one).metrics for one in (context, stretched)]
    assert votes[0] == votes[1]


def test_a_task_of_ones_own_has_keys_and_a_part_of_the_page(corpus: str, tmp_path: Path) -> None:
    config = parse(
        EvaluateConfig,
        ["model=m", f"corpus={corpus}", "output=o", f"tasks=[{OWN},zero_shot]"],
        {"task.centroids.sharpness": "2.5", "task.centroids.note": "0042", "neighbours": 3, "train_split": "train"},
    )
    assert config.recorded()["task"] == {"centroids": {"sharpness": 2.5, "note": "0042"}}
    assert parse(EvaluateConfig, ["--config", _written(tmp_path, config.to_yaml())]) == config
    assert config.without_effect() == ["neighbours has no effect without knn among tasks"]
    context = context_of(corpus, OWN, task={"centroids": {"sharpness": 2.5}})
    result = scorer(OWN).run(context)
    report = build(context, {OWN: result}, model_uri="m", duration_s=1.0)
    assert "Sharpness 2.5." in report.html
    assert 'id="centroids"' in report.html
    assert report.html.count('alt="shown"') == 1
    report.save(str(tmp_path / "report"))
    found, origin = predictions.read(str(tmp_path / "report" / "predictions" / "centroids.parquet"))
    assert origin.task == "centroids"
    assert isinstance(found, predictions.ClassPredictions)
    assert found.sample_ids == result.predictions.sample_ids  # type: ignore[union-attr]


def _written(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[zero_shoot]"], "there is no task 'zero_shoot'; there are classification, concepts, few_shot, knn, "),
        (
            ["tasks=[nowhere:x]"],
            "the task 'nowhere:x' cannot be imported: No module named 'nowhere'; the folder of a module",
        ),
        (["tasks=[tests.centroids:Centroids]"], "is a type, and must be a TaskKind"),
        ([f"tasks=[{OWN},tests.centroids_again:centroids]"], "would both be called 'centroids'"),
        ([f"tasks=[{OWN}]", "task.centroids.sharpness=-1"], "task.centroids.sharpness"),
        ([f"tasks=[{OWN}]", "task.centroids.sharpnes=1"], "task.centroids.sharpnes"),
        (["tasks=[knn]", "task.centroids.sharpness=1"], "centroids is not among tasks (knn)"),
        (["task=3"], "task: "),
        ([f"tasks=[{OWN}]", "task.centroids=3"], "task.centroids: input should be a valid dictionary"),
        (["tasks=[picky:task]", "task.task.note=odd"], "task.task.note: the {note} is odd"),
        (["tasks=[tests.centroids:knn]"], "'tests.centroids:knn' would be called 'knn', as DermRay's own is"),
        (["tasks=[../../up]"], "a task cannot be called '../../up'"),
        (["tasks=[lab.brightness]"], "a task cannot be called 'lab.brightness'"),
        (["tasks=[unparsable:task]"], "the task 'unparsable:task' cannot be imported: SyntaxError: "),
        (["tasks=[raising:task]"], "the task 'raising:task' cannot be imported: RuntimeError: two lines"),
    ],
)
def test_what_is_wrong_with_tasks_is_said(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "unparsable.py").write_text("def task(:")
    (tmp_path / "raising.py").write_text("raise RuntimeError('two\\nlines')")
    (tmp_path / "picky.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tests.centroids_again", centroids)
    with pytest.raises(ConfigError) as refused:
        parse(EvaluateConfig, ["model=m", "corpus=c", "output=o", *arguments])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("", "Nearest mean"),
        ("{% macro block() %}{{ section.no_such }}{% endmacro %}", None),
        ("{% macro block() %}{{ 1 / 0 }}{% endmacro %}", None),
        ("{% macro", None),
    ],
)
def test_a_task_without_a_page_shows_its_scores_and_a_broken_page_is_said(
    corpus: str, monkeypatch: pytest.MonkeyPatch, page: str, expected: str | None
) -> None:
    monkeypatch.setattr(centroids.SCORER, "page", page, raising=False)
    context = context_of(corpus, OWN)
    results = {OWN: scorer(OWN).run(context)}
    if expected is None:
        with pytest.raises(EvaluationError, match="centroids: its part of the page cannot be made: "):
            build(context, results, model_uri="m", duration_s=1.0)
        return
    html = build(context, results, model_uri="m", duration_s=1.0).html
    assert expected in html
    assert "balanced accuracy" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headline": ("f1",)}, "a headline that is no score: f1"),
        ({"metrics": {"accuracy": Metric(np.float32(0.5))}}, "its score accuracy must be a Metric of floats"),  # type: ignore[arg-type]
        ({"metrics": {"accuracy": Metric(0.5, 0.4)}}, "its score accuracy must be a Metric of floats with both ends"),
        ({"metrics": {"accuracy": 0.5}}, "its score accuracy must be a Metric"),
        ({"metrics": {"accuracy": Metric(float("inf"))}}, "its score accuracy must be finite"),
        ({"metrics": {"accuracy": Metric(0.5, float("nan"), 0.6)}}, "its score accuracy must be finite, or NaN alone"),
        ({"metrics": {"accuracy": Metric(0.5), "at_0.5/mm": Metric(1.0)}}, "letters, digits and _@%\\+-: at_0.5/mm"),
        ({"scales": {"f1": Scale(True)}}, "scales of no score: f1"),
        ({"details": {"loss": float("nan")}}, "its details are no JSON: "),
        ({"details": {"title": "x", "metrics": {}}}, "details by names of the report's own: metrics, title"),
        ({"details": {"number": np.int64(3)}}, "its details are no JSON: "),
        ({"pictures": frozenset([-1, 3, 40])}, "pictures of no sample: -1, 40"),
    ],
)
def test_a_result_that_no_report_can_be_made_of_is_refused(changes: dict[str, object], message: str) -> None:
    sound = TaskResult({"accuracy": Metric(0.5, 0.4, 0.6), "kappa": Metric(1)}, ("accuracy",), 40, {})
    require_sound(sound, 40)
    with pytest.raises(EvaluationError, match=message):
        require_sound(replace(sound, **changes), 40)  # type: ignore[arg-type]


def test_a_score_says_how_it_is_read(corpus: str) -> None:
    """In millimetres, of which less is better; and one that is not defined: on the page, in a terminal, in the gate."""
    context = context_of(corpus, OWN)
    result = scorer(OWN).run(context)
    scores = {"thickness_error": Metric(3.25, 3.1, 3.4), "hits": Metric(12.0, 11.0, 13.0), "kappa": Metric(math.nan)}
    scales = {"thickness_error": Scale(True, "mm"), "hits": Scale(unit="")}
    found = {}
    for name, factor in (("champion", 1.0), ("candidate", 1.2)):
        own = {key: Metric(*(end and end * factor for end in astuple(one))) for key, one in scores.items()}
        changed = replace(result, metrics=own, headline=tuple(own), scales=scales, predictions=None)
        require_sound(changed, len(context.samples))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(centroids.SCORER, "page", "", raising=False)
            found[name] = build(context, {OWN: changed}, model_uri="m", duration_s=1.0)
    report = found["champion"]
    assert report.headline()[0] == (
        f"centroids ({result.num_samples} samples): thickness_error 3.25 mm [3.1, 3.4], hits 12 [11, 13], kappa \u2013"
    )
    assert "3.25\u00a0mm" in report.html
    assert "centroids/kappa" not in report.metrics()
    undefined = report.document["tasks"]["centroids"]["metrics"]["kappa"]
    assert undefined == {"value": None, "low": None, "high": None}
    one, other = ({"": gate.Scored("r", found[name].document)} for name in ("champion", "candidate"))
    worse, better = gate.compare(one, other, margin=0.01)
    assert (worse.name, better.name) == ("centroids.thickness_error", "centroids.hits")
    assert worse.difference == pytest.approx(-0.65)
    assert worse.is_worse
    # A share of what the champion has: neither is a share of 1.
    assert worse.margin == pytest.approx(0.0325)
    assert better.difference == pytest.approx(2.4)


def test_a_scorer_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_done.py").write_text(
        "from dermray.evaluate.tasks.kinds import TaskKind\ntask = TaskKind('Half', 'half_done_module')\n"
    )
    (tmp_path / "half_done_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = EvaluateConfig(model="m", output="o", benchmark="derm1m", data="d", tasks=("half_done:task",))
    with pytest.raises(EvaluationError, match="cannot be imported: ZeroDivisionError: division by zero"):
        check_inputs(config)


def test_a_task_that_learns_without_saying_so_is_told(corpus: str) -> None:
    with pytest.raises(EvaluationError, match="a task that learns says so, by learns=True"):
        Labelled.of(replace(context_of(corpus, OWN), training=None))
