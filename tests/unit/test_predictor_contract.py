"""The contract of predictors: one suite, run against every one of ours, and what the examples of the tests show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermray.config import parse
from dermray.errors import ConfigError, EvaluationError, ModelError
from dermray.evaluate import predictions
from dermray.evaluate.classes import Classes
from dermray.evaluate.compare import compare, compare_reports
from dermray.evaluate.concepts import concepts_of
from dermray.evaluate.features import Features
from dermray.evaluate.leakage import Leakage
from dermray.evaluate.predictions import ConceptPredictions, Origin, OwnPredictions
from dermray.evaluate.predictors import kinds
from dermray.evaluate.predictors.contract import UNREADABLE, Lesson, Predict, Predicted, Seen, load
from dermray.evaluate.predictors.pictures import Looker, _pieces, _together
from dermray.evaluate.predictors.presence.module import Presence
from dermray.evaluate.probing import Labelled
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.suite import check_inputs, evaluate
from dermray.evaluate.tasks import kinds as tasks
from dermray.evaluate.tasks.contract import Context, TaskResult, scorer
from dermray.vectors.encoder_info import EncoderInfo
from tests import colours, darkness, rotation_model, without_ray
from tests.corpora import write_prepared_corpus
from tests.evaluation import features_of

RISK, DARKNESS = "tests.risk:risk", "tests.darkness:darkness"
NUM_SCORED, BROKEN = 20, 6
ORIGIN = Origin("risk", "val", "c" * 64, "a" * 64, "b" * 64)


class Absence(Presence):
    """Says of each concept how sure it is that it is not there."""

    def ready(self, lesson: Lesson) -> Predict:
        ours = super().ready(lesson)

        def predict(seen: Seen) -> Predicted:
            said = ours(seen)
            return replace(said, values=1 - said.values)

        return predict


ABSENCE, PREDICTOR = kinds.PredictorKind(__name__, kinds.CONCEPTS), Absence()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("predictors") / "corpus"
    write_prepared_corpus(folder, {"train": 40, "val": NUM_SCORED}, broken=[BROKEN])
    return str(folder)


def context_of(corpus: str, **settings: object) -> Context:
    config = EvaluateConfig(model="m", corpus=corpus, output="o", bootstrap=20, **settings)  # type: ignore[arg-type]
    samples, train = Samples.load(corpus, "val"), Samples.load(corpus, "train")
    features = features_of(samples, scorer("zero_shot").texts(samples, config), broken=[BROKEN])
    return Context(config, samples, features, (train, features_of(train, [])))


@pytest.mark.parametrize("name", [name for name in kinds.ours() if kinds.find(name).gives == kinds.CLASSES])
def test_classifiers_give_probabilities_of_what_has_a_vector_and_reasons_for_the_rest(corpus: str, name: str) -> None:
    context = context_of(corpus)
    data = Labelled.of(context)
    lesson = data.lesson(context)
    assert set(load(name).texts(lesson.classes, context.config)) <= set(
        scorer("zero_shot").texts(context.samples, context.config)
    )
    rows = np.arange(3, 12)
    said = load(name).ready(lesson)(context.seen(rows))
    assert said.values.shape == (len(rows), data.num_classes)
    np.testing.assert_array_equal(np.flatnonzero(~said.answered), [BROKEN - 3])
    assert said.left_out() == {UNREADABLE: 1}
    np.testing.assert_allclose(said.values[said.answered].sum(axis=1), 1.0, rtol=1e-5)
    # The model of the tests knows the conditions.
    truth = data.classes.targets[rows]
    assert (said.values.argmax(axis=1) == truth)[said.answered].mean() > 0.5
    np.testing.assert_array_equal(said.values, load(name).ready(lesson)(context.seen(rows)).values)


def test_every_predictor_of_ours_gives_what_a_task_of_ours_scores() -> None:
    scored = {tasks.find(name).takes for name in tasks.ours()}
    assert {kinds.find(name).gives for name in kinds.ours()} == {kinds.CLASSES, kinds.CONCEPTS} == scored - {""}


def test_the_task_of_concepts_scores_what_its_predictor_says(corpus: str) -> None:
    """The predictor of the tests says the contrary of ours: each area turns round."""
    settings = {"tasks": ("concepts",)}
    config = EvaluateConfig(model="m", corpus=corpus, output="o", bootstrap=0, **settings)  # type: ignore[arg-type]
    samples = Samples.load(corpus, "val")
    asked = Classes(names := tuple(concepts_of(samples)[0]), names, (None,) * len(names), np.zeros(0, np.int64))
    assert scorer("concepts").texts(samples, config) == load("presence").texts(asked, config)
    features = features_of(samples, scorer("concepts").texts(samples, config), broken=[BROKEN])
    context = Context(config, samples, features)
    ours = scorer("concepts").run(context)
    said = load("presence").ready(context.lesson(asked))(context.seen(np.arange(len(samples))))
    assert said.left_out() == {UNREADABLE: 1}
    found = ours.predictions
    assert isinstance(found, ConceptPredictions)
    np.testing.assert_array_equal(found.scores, said.values[said.answered])
    turned = config.model_copy(update={"predictor": {"concepts": f"{__name__}:ABSENCE"}})
    others = scorer("concepts").run(replace(context, config=turned))
    for one, other in zip(ours.details["concepts"], others.details["concepts"], strict=True):
        assert one["auroc"] == pytest.approx(1 - other["auroc"])
    assert ours.metrics["mean_auroc"].value != pytest.approx(0.5)
    of_prompts = {"templates", "references", "temperature"}
    assert (of_prompts <= ours.details.keys(), of_prompts & others.details.keys()) == (True, set())


@pytest.mark.parametrize(
    "task", [name for name in tasks.ours() if tasks.find(name).takes in (kinds.CLASSES, kinds.CONCEPTS)]
)
def test_who_sees_images_is_scored_without_an_encoder(corpus: str, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """The model that the run names is none of ours; one image cannot be decoded, and is left out and counted."""
    without_ray.use(monkeypatch)
    given = ["model=m", f"corpus={corpus}", "output=o", "bootstrap=0", f"tasks=[{task}]", "label_fractions=[0.5]"]
    who = "named" if task == "concepts" else "colours"
    config = parse(EvaluateConfig, [*given, "num_draws=2", "shots=[1,2]", f"predictor.{task}=tests.colours:{who}"])
    check_inputs(config)
    report = evaluate(config)
    found = report.document["tasks"][task]
    assert (report.document["model"]["name"], report.document["engine"]["num_images_encoded"]) == ("colours", 0)
    assert found["num_samples"] == NUM_SCORED - 1
    assert {reason: number for reason, number in found["excluded"].items() if number} == {UNREADABLE: 1}
    assert found["metrics"][found["headline"][0]]["value"] == 1.0
    assert len(report.predictions[task].sample_ids) == NUM_SCORED - 1
    # What only the task's own predictor asks with.
    assert not {"templates", "logit_scale", "k", "temperature"} & found.keys()
    assert not [name for name in found["metrics"] if name.startswith("synonyms_")]
    monkeypatch.setattr(colours.Nearest, "__call__", lambda self, images: np.ones((len(images), 7)))
    with pytest.raises(EvaluationError, match=rf"{task}: its predictor gives \[7\] numbers a sample for \d c[lo]"):
        evaluate(config)


def test_samples_that_one_fit_says_nothing_of_are_left_out_of_all(corpus: str) -> None:
    """Of two fits the first leaves out one sample and the second two others, one of which the first left out too."""
    data = Labelled.of(context_of(corpus))
    said = []
    for silent in ({2: "too dark"}, {2: "blurred", 5: "blurred"}):
        reasons = np.array([silent.get(row, "") for row in range(len(data.asked))], dtype=object)
        said.append(Predicted(np.full((len(reasons), data.num_classes), float(len(silent))), reasons))
    found, values = data.heard(said)
    np.testing.assert_array_equal(found.kept, np.delete(data.asked, [2, 5]))
    assert found.left_out == {UNREADABLE: 0, "blurred": 1, "too dark": 1}
    assert [(len(one), one.max()) for one in values] == [(len(found.kept), 1.0), (len(found.kept), 2.0)]
    assert len(found.labels) == len(found.predictions(values[0]).sample_ids) == len(found.kept)
    nothing = replace(said[0], reasons=np.full(len(data.asked), "blurred", dtype=object))
    with pytest.raises(EvaluationError, match="says nothing of the 20 samples: .*'blurred': 19, 'too dark': 1"):
        data.heard([said[0], nothing])


def test_predictors_are_not_told_the_truth(corpus: str) -> None:
    context = context_of(corpus)
    data = Labelled.of(context)
    lesson, seen = data.lesson(context, np.array([1, 5])), context.seen(np.arange(4))
    assert not any([*seen.samples.labels, *seen.samples.concepts, *filter(None, seen.samples.captions)])
    assert seen.samples.groups == context.samples.groups
    compared = ((corpus, None, context.samples.corpus_digest),)
    marked = Leakage("r", "t", "d", 6, compared, frozenset()).mark(context.samples)
    assert marked.groups.keys() - context.samples.groups.keys() == {"leakage"}
    assert replace(context, samples=marked).seen(np.arange(4)).samples.groups == context.samples.groups
    assert len(lesson.told_apart().targets) == 0
    assert lesson.learnt is not None
    assert [lesson.learnt.samples.labels[row] for row in lesson.learnt.rows] == [
        [lesson.told_apart().labels[label]] for label in lesson.examples()[1]
    ]
    with pytest.raises(EvaluationError, match="hands over nothing to learn from"):
        load("knn").ready(context.lesson(data.classes))
    with pytest.raises(EvaluationError, match="by a task that names none"):
        load("zero_shot").ready(context.lesson())


def test_a_run_names_who_predicts_for_a_task(corpus: str) -> None:
    """The scorer of nearest neighbours asks the linear probe, and finds what the linear probe's own task does."""
    settings = {"tasks": ("knn", "linear_probe"), "label_fractions": (1.0,)}
    probed = scorer("linear_probe").run(context_of(corpus, **settings))
    voted = scorer("knn").run(context_of(corpus, **settings))
    found = scorer("knn").run(context_of(corpus, **settings, predictor={"knn": "linear_probe"}))
    assert found.metrics["macro_auroc"] == probed.metrics["100pct_macro_auroc"]
    given, of_probe, of_votes = (one.predictions.probabilities for one in (found, probed, voted))  # type: ignore[union-attr]
    # The order of what is learnt from is another, which only rounding shows.
    np.testing.assert_allclose(given, of_probe, atol=1e-5)
    assert np.abs(given - of_votes).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tasks=[knn]", "predictor.knn=knnn"],
            "there is no predictor 'knnn'; there are knn, linear_probe, presence, zero_shot",
        ),
        (["tasks=[knn]", f"predictor.knn={DARKNESS}"], f"predictor.knn: {DARKNESS} gives risk, and knn scores classes"),
        (["tasks=[knn]", "predictor.few_shot=knn"], "predictor.few_shot: few_shot is not among tasks (knn)"),
        (
            ["predictor.retrieval=knn"],
            "predictor.retrieval: retrieval works on vectors of the run's model and asks no predictor; leave it out",
        ),
        (["predictor_keys.retrieval.power=2"], "retrieval is not among tasks that ask a predictor (zero_shot)"),
        (["tasks=[knn]", "predictor_keys.knn.power=2"], "unknown key 'predictor_keys.knn.power'"),
        (
            [f"tasks=[{RISK}]", f"predictor.risk={DARKNESS}", "predictor_keys.risk.power=0"],
            "predictor_keys.risk.power: ",
        ),
        ([f"tasks=[{RISK}]", f"predictor.risk={DARKNESS}", "predictor_keys.risk.powr=2"], "'predictor_keys.risk.powr'"),
        ([f"tasks=[{RISK}]", "predictor.risk=gone", "predictor_keys.risk.power=2"], "there is no predictor 'gone'"),
        ([f"tasks=[{RISK}]"], "the task risk needs a predictor that gives risk: predictor.risk=NAME"),
        ([f"tasks=[{RISK}]", "predictor.risk=tests.darkness:Darkness"], "is a type, and must be a PredictorKind"),
    ],
)
def test_what_is_wrong_with_predictors_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(EvaluateConfig, ["model=m", "corpus=c", "output=o", *arguments])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_predictor_has_keys_of_its_own(corpus: str, tmp_path: Path) -> None:
    given = ["model=m", f"corpus={corpus}", "output=o", f"tasks=[{RISK},knn]", f"predictor.risk={DARKNESS}"]
    config = parse(EvaluateConfig, [*given, "predictor_keys.risk.power=2"])
    assert config.predictor_keys == {"risk": darkness.DarknessConfig(power=2.0)}
    assert config.recorded()["predictor_keys"] == {"risk": {"power": 2.0}}, "a report says so"
    assert parse(EvaluateConfig, given).recorded()["predictor_keys"] == {"risk": {"power": 1.0}}
    assert parse(EvaluateConfig, given[:3]).predictor_keys == {}
    (tmp_path / darkness.WEIGHTS).write_text("[0.3, 0.3, 0.3]")
    looks: list[darkness.Look] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(darkness, "look_at", lambda seen, look, config: looks.append(look))
        for one in (config, parse(EvaluateConfig, given)):
            context = replace(context_of(corpus), config=one, model_uri=str(tmp_path))
            context.predictor("risk").ready(context.lesson())(context.seen(np.arange(2)))
    assert [look.power for look in looks] == [2.0, 1.0]


def test_a_model_whose_kind_only_predicts_is_scored_by_who_asks_for_no_vectors(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray.use(monkeypatch)
    state = dict(rotation_model.layers(8).state_dict())
    rotation_model.write(str(tmp_path), "judge", state, {"side": 8}, {})
    (tmp_path / darkness.WEIGHTS).write_text("[0.3, 0.3, 0.3]")
    given = [f"model={tmp_path}", f"corpus={corpus}", "output=o", "bootstrap=0", f"predictor.risk={DARKNESS}"]
    config = parse(EvaluateConfig, [*given, f"tasks=[{RISK}]", "predictor_keys.risk.power=2"])
    check_inputs(config)
    report = evaluate(config)
    assert report.document["model"]["name"] == tmp_path.name
    assert report.document["config"]["predictor_keys"] == {"risk": {"power": 2.0}}
    assert report.document["tasks"]["risk"]["num_samples"] == NUM_SCORED - 1
    wants_vectors = parse(EvaluateConfig, [*given, f"tasks=[{RISK},knn]", f"cache={tmp_path}/cache"])
    with pytest.raises(ModelError, match="gives no vectors of images"):
        evaluate(wants_vectors)


def test_who_looks_at_images_needs_no_encoder(corpus: str, tmp_path: Path) -> None:
    given = ["model=m", f"corpus={corpus}", "output=o"]
    config = parse(EvaluateConfig, [*given, f"tasks=[{RISK},knn]", f"predictor.risk={DARKNESS}"])
    assert config.recorded()["predictor"] == {"risk": DARKNESS}
    assert config.sees_vectors(["knn"])
    assert not config.sees_vectors([RISK])
    of_table = ["model=m", "data=d.csv", "output=o", "predictor.linear_probe=knn"]
    assert parse(EvaluateConfig, of_table).predictor_of("linear_probe") == "knn"
    # Of a table without captions the one task is zero-shot, whose predictor says what `model` is.
    (tmp_path / "a.png").touch()
    (tmp_path / "labelled.csv").write_text("image,label\na.png,melanoma\n")
    given_table = ["model=m", f"data={tmp_path}/labelled.csv", "output=o", "predictor.zero_shot=tests.colours:colours"]
    check_inputs(parse(EvaluateConfig, given_table))
    (tmp_path / "half_predictor.py").write_text(
        "from dermray.evaluate.predictors.kinds import PredictorKind\nkind = PredictorKind('no_such_module', 'risk')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        half = EvaluateConfig(
            model="m", corpus=corpus, output="o", tasks=(RISK,), predictor={"risk": "half_predictor:kind"}
        )
        with pytest.raises(EvaluationError, match="the predictor 'half_predictor:kind' cannot be imported: No module"):
            check_inputs(half)


def test_images_are_looked_at_where_they_lie_and_answers_find_their_places(corpus: str) -> None:
    """Rows in any order, over row groups; the pool itself is tested by the evaluation job on Ray."""
    samples = Samples.load(corpus, "val")
    features = features_of(samples, [])
    rows = np.array([17, 2, BROKEN, 9, 3, 8])
    look = Looker(darkness.Look((0.4, 0.3, 0.3)), batch_size=2)
    pieces = _pieces(Seen.of(samples, features, rows))
    assert [piece.unit for piece in pieces] == [*samples.images]
    said = _together(len(rows), [(piece, *look(piece)) for piece in reversed(pieces)])
    np.testing.assert_array_equal(said.reasons == UNREADABLE, rows == BROKEN)
    alone = [_together(1, [(one, *look(one)) for one in _pieces(Seen.of(samples, features, rows[at : at + 1]))])
             for at in range(len(rows)) if at != 2]  # fmt: skip
    # A product of one row is rounded otherwise than one of two.
    np.testing.assert_allclose(said.values[said.answered], np.concatenate([one.values for one in alone]), rtol=1e-12)
    masks = Looker(lambda images: np.ones((len(images), 4, 6), dtype=bool), batch_size=64)
    assert _together(len(rows), [(piece, *masks(piece)) for piece in pieces]).values.sum() == 5 * 24
    with pytest.raises(EvaluationError, match="none of the 1 images is readable"):
        _together(1, [(one, *look(one)) for one in _pieces(Seen.of(samples, features, np.array([BROKEN])))])
    with pytest.raises(EvaluationError, match=r"the predictor gives \[3\] for 1 images"):
        Looker(lambda images: np.zeros(3), batch_size=1)(pieces[0])
    diverged = Looker(lambda images: np.full(len(images), np.inf), batch_size=64)
    with pytest.raises(EvaluationError, match="numbers that are not finite"):
        _together(len(rows), [(piece, *diverged(piece)) for piece in pieces])


def own(risks: list[float], *, scored_by: str = RISK, malignant: tuple[int, ...] = (0, 1, 0, 1)) -> OwnPredictions:
    return OwnPredictions(
        [f"s{number}" for number in range(4)],
        {"risk": np.array(risks), "overlap": np.arange(8).reshape(4, 2)},
        {"malignant": np.array(malignant), "seen": np.array([True, False, True, True])},
        scored_by,
    )


def test_predictions_of_any_form_are_kept_and_two_models_compared_by_their_task(tmp_path: Path) -> None:
    predictions.write(str(tmp_path / "risk.parquet"), own([0.1, 0.9, 0.4, 0.3]), ORIGIN)
    kept, origin = predictions.read(str(tmp_path / "risk.parquet"))
    assert isinstance(kept, OwnPredictions)
    assert (origin, kept.scored_by, kept.sample_ids) == (ORIGIN, RISK, ["s0", "s1", "s2", "s3"])
    for name in ("predicted", "truth"):
        before, after = getattr(own([0.1, 0.9, 0.4, 0.3]), name), getattr(kept, name)
        assert [*before] == [*after]
        for column, values in before.items():
            np.testing.assert_array_equal(after[column], values)
    found = compare(kept, own([0.1, 0.9, 0.2, 0.7]), bootstrap=50)
    assert (found["auroc"].baseline, found["auroc"].candidate) == (0.75, 1.0)
    assert found["distance"].difference.value == pytest.approx(-0.15)
    sure = replace(found["distance"], p_value=0.01)
    assert sure.is_better("distance", {"lower_is_better": True, "unit": ""})
    assert sure.is_worse("distance")
    same = own([0.1, 0.9, 0.4, 0.3])
    for other, message in (
        (own([0.1, 0.9, 0.4, 0.3], malignant=(0, 1, 1, 1)), "the predictions have other true malignant"),
        (own([0.1, 0.9, 0.4, 0.3], scored_by="lab:risk"), "the predictions have other tasks"),
        (replace(same, truth={"malignant": same.truth["malignant"]}), "the predictions have other true seen"),
    ):
        with pytest.raises(EvaluationError, match=message):
            compare(kept, other, bootstrap=10)
    for wrong in (
        {"risk": np.zeros(3)},
        {"risk": np.zeros((4, 2, 2))},
        {"risk": np.array(["a"] * 4)},
        {"a.b": np.zeros(4)},
    ):
        with pytest.raises(EvaluationError, match=r"numbers \[N\] or \[N, K\] of 4 samples, by names without points"):
            replace(same, predicted=wrong)
    gone = replace(same, scored_by="gone.lab:risk")
    with pytest.raises(EvaluationError, match=r"the task 'gone\.lab:risk' cannot be imported: No module"):
        compare(gone, gone, bootstrap=10)


def test_a_report_keeps_who_scores_its_predictions(corpus: str, tmp_path: Path) -> None:
    config = EvaluateConfig(model="m", corpus=corpus, output="o", tasks=(RISK,), predictor={"risk": DARKNESS})
    samples = Samples.load(corpus, "val")
    info = EncoderInfo("dark", 0, 0, 0, "a" * 64, "", 3)
    context = Context(config, samples, Features.none(samples, info))
    result = TaskResult({"auroc": Metric(1.0)}, ("auroc",), 4, {"left": 16}, {"groups": {"dimensions": {}}},
                        predictions=own([0.1, 0.9, 0.4, 0.3], scored_by=""), scales={})  # fmt: skip
    report = build(context, {RISK: result}, model_uri="m", duration_s=1.0)
    report.save(str(tmp_path / "out"))
    assert report.document["tasks"]["risk"]["predictor"] == DARKNESS
    assert f"risk: {DARKNESS}" in report.html
    assert "3 parameters, no vectors" in report.html
    assert compare_reports(str(tmp_path / "out"), str(tmp_path / "out"), "risk", bootstrap=0)["auroc"].baseline == 0.75
