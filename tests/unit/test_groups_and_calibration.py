"""For whom and how far to be trusted: groups, gaps, leakage, calibration and the temperature."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from dermray.corpus.schema import MODALITY
from dermray.errors import EvaluationError, ModelError
from dermray.evaluate import cases
from dermray.evaluate.classified import group_scores
from dermray.evaluate.leakage import FOUND, Leakage
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import groups
from dermray.evaluate.statistics.bootstrap import Distribution, Metric
from dermray.evaluate.statistics.calibration import apply_temperature, calibrate, fit_temperature
from dermray.evaluate.statistics.groups import age_band, breakdown, of_corpus, of_table
from dermray.evaluate.statistics.metrics import classification
from dermray.evaluate.suite import evaluate
from dermray.evaluate.tasks.contract import Context, scorer
from dermray.evaluate.tasks.kinds import ours
from tests.corpora import write_prepared_corpus
from tests.evaluation import features_of

CLASSIFIERS = ["zero_shot", "linear_probe", "knn"]


def draw(seed: int, num: int, num_classes: int = 4, *, skill: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(num) % num_classes
    logits = np.random.default_rng(seed).normal(size=(num, num_classes))
    logits[np.arange(num), labels] += skill
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("groups") / "corpus"
    write_prepared_corpus(folder, {"train": 48, "val": 24, "test": 60})
    return str(folder)


def context_of(corpus: str, name: str, **settings: object) -> Context:
    given = {"split": "test", "tasks": (name,), "bootstrap": 40, "min_group_size": 5} | settings
    config = EvaluateConfig(model="m", corpus=corpus, output="o", **given)  # type: ignore[arg-type]
    case = cases.of_config(config)
    features = features_of(case.samples, scorer(name).texts(case.samples, config))
    training = (case.training, features_of(case.training, [])) if case.training else None
    validation = (case.validation, features_of(case.validation, [])) if case.validation else None
    return Context(config, case.samples, features, training, validation)


def test_groups_of_a_prepared_corpus() -> None:
    meta = {"sex": "Female", "age": 17.5, "body_site": " face ", "extra": None}
    rows = [
        {"skin_type": 5, "source": "a", "meta": meta, "modality": None},
        {"skin_type": None, "source": "b", "meta": None, "modality": None},
        {
            "skin_type": 1,
            "source": "a",
            "meta": {"sex": "unknown", "age": float("nan"), "body_site": None},
            "modality": None,
        },
    ]
    known = of_corpus(rows)
    rows[1]["modality"] = "dermoscopic"
    assert of_corpus(rows) == {**known, "modality": [None, "dermoscopic", None]}
    assert known == {
        "skin_type": ["V", None, "I"],
        "sex": ["female", None, None],
        "age": ["under 18", None, None],
        "body_site": ["face", None, None],
        "source": ["a", "b", "a"],
    }


def test_groups_of_published_tables_by_their_own_columns() -> None:
    fitzpatrick17k = of_table([{"fitzpatrick_scale": "-1"}, {"fitzpatrick_scale": "6"}])
    assert fitzpatrick17k == {"skin_type": [None, "VI"]}
    assert of_table([{"skin_tone": "12"}, {"skin_tone": "56"}]) == {"skin_type": ["I and II", "V and VI"]}
    ham = of_table([{"dx": "nv", "AGE": "80.0", "Sex": "male", "localization": "back", "dataset": "rosendahl"}])
    assert ham == {"sex": ["male"], "age": ["80 and over"], "body_site": ["back"], "source": ["rosendahl"]}
    isic = of_table([{"image_type": "TBP tile: close-up"}, {"image_type": "art"}])
    assert isic == {"modality": ["total-body", None]}
    assert of_table([]) == {}


@given(st.floats(0, 130))
def test_every_age_has_one_band(years: float) -> None:
    ends = {
        "under 18": (0, 18),
        "18 to 39": (18, 40),
        "40 to 59": (40, 60),
        "60 to 79": (60, 80),
        "80 and over": (80, 999),
    }
    low, high = ends[age_band(years) or ""]
    assert low <= years < high


def test_scores_of_a_group_are_those_of_its_samples_alone() -> None:
    scores, labels = draw(0, 200)
    members: list[str | None] = ["I" if n % 3 else "V" for n in range(200)]
    members[7] = None
    rows = np.arange(5, 200)
    found = breakdown(
        {"skin_type": members, "source": ["one"] * 200},
        rows,
        lambda kept, seed: group_scores(scores[rows[kept]], labels[rows[kept]], bootstrap=60, seed=seed),
        min_size=20,
        seed=0,
    )
    assert list(found["dimensions"]) == ["skin_type"]
    skin_type = found["dimensions"]["skin_type"]
    assert skin_type["num_unknown"] == 1
    for group in skin_type["groups"]:
        mine = np.array([row for row in rows if members[row] == group["name"]])
        assert group["num_samples"] == len(mine)
        alone = classification(scores[mine], labels[mine], bootstrap=0)
        for name in ("accuracy", "balanced_accuracy", "macro_auroc"):
            assert group["metrics"][name]["value"] == pytest.approx(alone[name].value)
            assert group["metrics"][name]["low"] < group["metrics"][name]["high"]
    accuracy = {group["name"]: group["metrics"]["accuracy"]["value"] for group in skin_type["groups"]}
    gap = skin_type["gaps"]["accuracy"]
    assert gap["value"] == pytest.approx(max(accuracy.values()) - min(accuracy.values()))
    assert accuracy[gap["best"]] >= accuracy[gap["worst"]]
    assert gap["low"] < gap["value"] < gap["high"]


def test_small_groups_have_no_score_and_groups_of_one_class_an_accuracy() -> None:
    scores, labels = draw(1, 100)
    members: list[str | None] = ["small"] * 9 + ["large"] * 91
    one_class: list[str | None] = [f"class {label}" for label in labels]
    found = breakdown(
        {"sex": members, "body_site": one_class},
        np.arange(100),
        lambda kept, seed: group_scores(scores[kept], labels[kept], bootstrap=20, seed=seed),
        min_size=10,
        seed=0,
    )["dimensions"]
    assert [(group["name"], group["num_samples"], bool(group["metrics"])) for group in found["sex"]["groups"]] == [
        ("large", 91, True),
        ("small", 9, False),
    ]
    assert found["sex"]["gaps"] == {}
    for group in found["body_site"]["groups"]:
        assert list(group["metrics"]) == ["accuracy"]


def test_many_groups_are_those_that_a_plain_search_finds_and_small_ones_counted_together(corpus: str) -> None:
    generator = np.random.default_rng(5)
    sites: list[str | None] = [f"site {number % 9 if number < 300 else number}" for number in range(700)]
    bands = (None, "under 18", "18 to 39", "80 and over")
    members = {"age": [bands[number % 4] for number in range(700)], "body_site": sites}
    for number in generator.choice(700, 40, replace=False):
        sites[number] = None
    rows = np.sort(generator.choice(700, 500, replace=False))
    asked: list[tuple[list[int], object]] = []

    def score(kept: np.ndarray, seed: object) -> dict[str, Distribution]:
        asked.append((kept.tolist(), seed))
        return {"accuracy": Distribution(float(rows[kept].mean()), np.zeros(0))}

    found = breakdown(members, rows, score, min_size=12, seed=3)["dimensions"]
    plain, sizes = [], {}
    for number, (dimension, of_all) in enumerate(members.items()):
        known = sorted({of_all[row] for row in rows} - {None}, key=lambda name: (name != "under 18", name))
        sizes[dimension] = {name: sum(of_all[row] == name for row in rows) for name in known}
        for place, name in enumerate(known):
            if sizes[dimension][name] >= 12:
                plain.append(([at for at, row in enumerate(rows) if of_all[row] == name], [3, number, place]))
        unknown, listed = found[dimension]["num_unknown"], found[dimension]["groups"]
        assert unknown + sum(sizes[dimension].values()) == len(rows)
        assert {one["name"]: one["num_samples"] for one in listed}.items() <= sizes[dimension].items()
    assert asked == plain
    assert [one["name"] for one in found["age"]["groups"]] == list(bands[1:])
    assert "too_small" not in found["age"]
    small = [size for size in sizes["body_site"].values() if size < 12]
    assert found["body_site"]["too_small"] == {"num_groups": len(small), "num_samples": sum(small)}
    assert len(found["body_site"]["groups"]) == len(sizes["body_site"]) - len(small) == 9
    context = context_of(corpus, "zero_shot", bootstrap=0)
    names: list[str | None] = [f"site {number}" for number in range(len(context.samples))]
    context = replace(context, samples=replace(context.samples, groups={"body_site": names}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MAX_SMALL", 20)
        page = build(context, {"zero_shot": scorer("zero_shot").run(context)}, model_uri="m", duration_s=1.0).html
    assert "Too few for a score: 60 groups of 60 samples together." in page
    assert "site 7" not in page


def test_groups_of_the_same_size_are_resampled_apart() -> None:
    """Otherwise two groups of equal samples would never differ, and a gap would have no width."""
    scores, labels = draw(2, 80)
    doubled, twice = np.concatenate([scores, scores]), np.concatenate([labels, labels])
    found = breakdown(
        {"sex": ["female"] * 80 + ["male"] * 80},
        np.arange(160),
        lambda kept, seed: group_scores(doubled[kept], twice[kept], bootstrap=100, seed=seed),
        min_size=10,
        seed=0,
    )["dimensions"]["sex"]["gaps"]["accuracy"]
    assert found["value"] == 0.0
    assert found["low"] < 0 < found["high"]


def test_calibration_equals_a_plain_computation() -> None:
    scores, labels = draw(3, 300)
    found = calibrate(scores, labels, bootstrap=50)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.expected_calibration_error == pytest.approx(error, abs=1e-12)
    assert found.nll.value == pytest.approx(reference.log_loss(labels, scores))
    one_hot = np.eye(4)[labels]
    assert found.brier.value == pytest.approx(((scores - one_hot) ** 2).sum(axis=1).mean())
    for metric in (found.nll, found.brier):
        assert isinstance(metric, Metric)
        assert metric.low is not None
        assert metric.low < metric.value < metric.high
    assert sum(one["num_samples"] for one in found.bins) == 300


def test_certain_and_right_is_perfect_and_certain_and_wrong_the_worst() -> None:
    perfect = calibrate(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 2, 0]), bootstrap=0)
    assert (perfect.expected_calibration_error, perfect.brier.value) == (0.0, 0.0)
    assert perfect.nll.value == pytest.approx(0.0, abs=1e-9)
    worst = calibrate(np.eye(3)[[1, 2, 0]], np.array([0, 1, 2]), bootstrap=0)
    assert (worst.expected_calibration_error, worst.brier.value) == (1.0, 2.0)
    assert worst.nll.value == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_spoiled_probabilities_is_found(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = 2.0 * generator.normal(size=(20_000, 5))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (honest.cumsum(axis=1) > generator.random((20_000, 1))).argmax(axis=1)
    spoiled = apply_temperature(honest, 1.0 / temperature)
    assert fit_temperature(spoiled, labels) == pytest.approx(temperature, rel=0.03)
    mended = calibrate(apply_temperature(spoiled, temperature), labels, bootstrap=0)
    assert mended.expected_calibration_error < 0.015
    with pytest.raises(EvaluationError, match="above 0"):
        apply_temperature(spoiled, 0.0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_temperature_comes_of_the_validation_split_alone(corpus: str, name: str) -> None:
    context = context_of(corpus, name)
    details = scorer(name).run(context).details
    found = details["calibration"]["temperature"]
    assert (found["split"], found["num_samples"]) == ("val", 24)
    assert details["calibration"]["without_temperature"] is None
    # Other labels in the scored split change nothing; other labels in the validation split do.
    shuffled = replace(context.samples, labels=context.samples.labels[1:] + context.samples.labels[:1])
    assert scorer(name).run(replace(context, samples=shuffled)).details["calibration"]["temperature"]["value"] == (
        pytest.approx(found["value"])
    )
    assert context.validation is not None
    samples, features = context.validation
    wrong = replace(samples, labels=samples.labels[1:] + samples.labels[:1])
    other = scorer(name).run(replace(context, validation=(wrong, features))).details["calibration"]["temperature"]
    assert other["value"] > 2 * found["value"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"split": "val"}, "the split 'val' is scored or learnt from"),
        ({"validation_split": "train"}, "the split 'train' is scored or learnt from"),
        ({"validation_split": "calibration"}, "there is no split 'calibration'"),
    ],
)
def test_without_a_validation_split_the_report_says_why(corpus: str, settings: dict[str, str], reason: str) -> None:
    found = scorer("zero_shot").run(context_of(corpus, "zero_shot", **settings)).details["calibration"]
    assert found["temperature"] is None
    assert reason in found["without_temperature"]


def test_a_validation_split_without_labels_is_no_error(corpus: str) -> None:
    context = context_of(corpus, "zero_shot")
    assert context.validation is not None
    samples, features = context.validation
    bare = replace(samples, labels=[[] for _ in samples.labels])
    found = scorer("zero_shot").run(replace(context, validation=(bare, features))).details["calibration"]
    assert "no readable image with a label" in found["without_temperature"]


@pytest.mark.parametrize("name", sorted(set(ours()) - {"few_shot"}))
def test_every_task_says_for_whom(corpus: str, name: str) -> None:
    context = context_of(corpus, name, bootstrap=20)
    result = scorer(name).run(context)
    dimensions = result.details["groups"]["dimensions"]
    # One source only, and nothing known of sex, age and site in this corpus.
    assert list(dimensions) == ["skin_type"]
    assert [group["num_samples"] for group in dimensions["skin_type"]["groups"]] == [10] * 6
    report = build(context, {name: result}, model_uri="m", duration_s=1.0)
    assert "Fitzpatrick skin type" in report.html
    assert any("_gap_skin_type" in key for key in report.metrics())


def test_kinds_of_picture_are_scored_apart_where_the_corpus_says_them(tmp_path: Path) -> None:
    manifest, shards = write_prepared_corpus(tmp_path, {"test": 24}), []
    for shard in manifest.shards:
        table = pq.read_table(tmp_path / shard.path)
        kinds = pa.array([("dermoscopic", "clinical", None)[row % 3] for row in range(table.num_rows)])
        pq.write_table(table.append_column(MODALITY, kinds), tmp_path / shard.path, row_group_size=8)
        content = (tmp_path / shard.path).read_bytes()
        changed = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        shards.append(shard.model_copy(update=changed))
    manifest.model_copy(update={"shards": tuple(shards)}).save(str(tmp_path))
    context = context_of(str(tmp_path), "zero_shot")
    result = scorer("zero_shot").run(context)
    found = result.details["groups"]["dimensions"]["modality"]
    sizes = {group["name"]: group["num_samples"] for group in found["groups"]}
    assert (sizes, found["num_unknown"]) == ({"clinical": 8, "dermoscopic": 8}, 8)
    assert all("accuracy" in group["metrics"] for group in found["groups"])
    page = build(context, {"zero_shot": result}, model_uri="m", duration_s=1.0).html
    assert re.search(r"<h3>Kind of picture.*8 not known", page)


def write_leakage(folder: Path, samples: Samples, rows: list[int]) -> str:
    """A report as jobs/leakage.py writes it, of some samples of a split."""
    document = {
        "max_distance": 6,
        "training": {"uri": "/training", "digest": "t" * 64},
        "evaluations": [{"uri": samples.uri, "split": samples.split, "digest": samples.corpus_digest}],
    }
    folder.mkdir()
    (folder / "leakage.json").write_text(json.dumps(document))
    pairs = [(samples.uri, samples.split, samples.ids[row]) for row in rows]
    columns = ("evaluation_corpus", "evaluation_split", "evaluation_sample_id")
    pq.write_table(
        pa.table({name: [pair[n] for pair in pairs] for n, name in enumerate(columns)}), folder / "leakage.parquet"
    )
    return str(folder)


def test_leaked_samples_are_counted_and_scored_apart(corpus: str, tmp_path: Path) -> None:
    context = context_of(corpus, "zero_shot")
    uri = write_leakage(tmp_path / "leakage", context.samples, [*range(0, 36, 2), 0])
    leakage = Leakage.load(uri)
    context = replace(context, samples=leakage.mark(context.samples))
    result = scorer("zero_shot").run(context)
    groups = {one["name"]: one["num_samples"] for one in result.details["groups"]["dimensions"]["leakage"]["groups"]}
    assert groups[FOUND] == 18
    report = build(context, {"zero_shot": result}, model_uri="m", duration_s=1.0, leakage=leakage)
    assert report.document["leakage"]["num_samples_found"] == 18
    assert "18 of the 60 samples resemble a training image of /training" in report.html
    others = Samples.load(corpus, "val")
    assert leakage.describe(others) is None
    assert leakage.mark(others) is others


def test_a_report_of_another_split_than_the_model_learned_is_refused(corpus: str, tmp_path: Path) -> None:
    """Its samples would all be said to resemble none; a report that says no splits is taken as it was before."""
    samples, model = Samples.load(corpus, "test"), tmp_path / "model"
    uri = write_leakage(tmp_path / "leakage", samples, [0])
    file = tmp_path / "leakage" / "leakage.json"
    model.mkdir()
    config = EvaluateConfig(model=str(model), corpus=corpus, output="o", leakage=uri, split="test")

    def told(splits: list[str] | None, recipe: dict[str, object]) -> str:
        training = {"uri": "/training", "digest": "t" * 64} | ({} if splits is None else {"splits": splits})
        file.write_text(json.dumps(json.loads(file.read_text()) | {"training": training}))
        (model / "dermray.json").write_text(json.dumps({"corpus_digest": "t" * 64} | recipe))
        with pytest.raises((EvaluationError, ModelError)) as refused:
            evaluate(config)
        return str(refused.value)

    of_fit = {"recipe": {"data": {"split": "fit"}}}
    wrong = "leakage: .* compared the split val of /training, and the model was trained on the split {}: run jobs/leak"
    assert re.match(wrong.format("train"), told(["val"], {}))
    assert re.match(wrong.format("fit"), told(["val"], of_fit))
    for splits, recipe in ((["train"], {}), (["val", "fit"], of_fit), (None, of_fit)):
        assert "leakage" not in told(splits, recipe), "it goes on to the model, which has no weights"


def test_what_is_no_leakage_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no leakage\.json; give the output of jobs/leakage\.py"):
        Leakage.load(str(tmp_path))
    (tmp_path / "leakage.json").write_text("{}")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "leakage.parquet")
    with pytest.raises(EvaluationError, match="is no whole report"):
        Leakage.load(str(tmp_path))


def test_pairs_of_another_report_are_refused(corpus: str, tmp_path: Path) -> None:
    """As a run leaves them that is killed, or whose store fails, between the files of the next report."""
    uri = write_leakage(tmp_path / "leakage", Samples.load(corpus, "test"), [0, 2])
    document, pairs = json.loads((Path(uri) / "leakage.json").read_text()), Path(uri) / "leakage.parquet"
    document["pairs_sha256"] = hashlib.sha256(pairs.read_bytes()).hexdigest()
    (Path(uri) / "leakage.json").write_text(json.dumps(document))
    assert Leakage.load(uri).found
    pq.write_table(pq.read_table(pairs).slice(1), pairs)
    with pytest.raises(EvaluationError, match=r"is no whole report; run jobs/leakage\.py again"):
        Leakage.load(uri)


def test_the_page_is_whole_in_itself_and_shows_neighbours(corpus: str) -> None:
    context = context_of(corpus, "zero_shot")
    result = scorer("zero_shot").run(context)
    example = (result.details["examples"]["right"] + result.details["examples"]["wrong"])[0]
    assert len(example["neighbours"]) == 4
    assert example["index"] not in {one["index"] for one in example["neighbours"]}
    cosines = [one["cosine"] for one in example["neighbours"]]
    assert cosines == sorted(cosines, reverse=True)
    report = build(context, {"zero_shot": result}, model_uri="m", duration_s=1.0)
    assert report.html.count("data:image/jpeg;base64,") >= 5
    assert 'src="http' not in report.html
    assert report.document["code"]["digest"] in report.html
    assert "Not looked for" in report.html
