"""Predictions beside a report, and the paired comparison of two models on the same samples."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn import metrics as reference

from dermray.commands import compare as job
from dermray.errors import ConfigError, EvaluationError
from dermray.evaluate import predictions
from dermray.evaluate.compare import Difference, compare, compare_reports
from dermray.evaluate.comparison import run
from dermray.evaluate.concepts import mean_auroc
from dermray.evaluate.predictions import ClassPredictions, ConceptPredictions, Origin, RetrievalPredictions
from dermray.evaluate.report import SuiteReport, build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import CompareConfig, EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Distribution, Metric, resample_weights
from dermray.evaluate.statistics.metrics import METRIC_NAMES, classification
from dermray.evaluate.tasks.contract import Context, scorer
from dermray.evaluate.tasks.kinds import ours
from dermray.release import gate
from tests.conftest import ROOT
from tests.corpora import write_prepared_corpus
from tests.evaluation import INFO, features_of

ORIGIN = Origin("zero_shot", "val", "c" * 64, "a" * 64, "b" * 64)


def classified(seed: int, num: int = 120, num_classes: int = 4, *, skill: float = 1.0) -> ClassPredictions:
    """A model's predictions on the same labels whatever the seed."""
    labels = np.arange(num) % num_classes
    logits = np.random.default_rng(seed).normal(size=(num, num_classes))
    logits[np.arange(num), labels] += skill
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = tuple(f"class {n}" for n in range(num_classes))
    return ClassPredictions([f"s{n}" for n in range(num)], labels, scores.astype(np.float32), names)


def marked(seed: int, num: int = 90) -> ConceptPredictions:
    marks = (np.arange(num)[:, None] % np.array([2, 3]) == 0).astype(np.int64)
    scores = np.random.default_rng(seed).normal(size=marks.shape) + 0.8 * marks
    return ConceptPredictions([f"s{n}" for n in range(num)], scores.astype(np.float32), marks, ("papule", "scale"))


def ranked(seed: int, num: int = 90) -> RetrievalPredictions:
    ranks = np.random.default_rng(seed).integers(0, num, (4, num))
    return RetrievalPredictions([f"s{n}" for n in range(num)], *ranks)


@pytest.mark.parametrize("make", [classified, marked, ranked])
def test_predictions_come_back_as_written(make, tmp_path: Path) -> None:
    written = make(0)
    predictions.write(str(tmp_path / "p.parquet"), written, ORIGIN)
    found, origin = predictions.read(str(tmp_path / "p.parquet"))
    assert origin == ORIGIN
    assert type(found) is type(written)
    for name, value in vars(written).items():
        np.testing.assert_array_equal(getattr(found, name), value)
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype


def test_predictions_are_columns_that_any_reader_understands(tmp_path: Path) -> None:
    predictions.write(str(tmp_path / "p.parquet"), classified(0), ORIGIN)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["sample_id", "label", "probabilities"]
    assert str(table.schema.field("probabilities").type).startswith("fixed_size_list<")
    assert len(table["probabilities"][0]) == 4
    about = json.loads(table.schema.metadata[b"dermray.predictions"])
    assert about["kind"] == "classification"
    assert about["classes"] == [f"class {n}" for n in range(4)]


def test_what_is_no_predictions_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no predictions at"):
        predictions.read(str(tmp_path / "none.parquet"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match="holds no predictions"):
        predictions.read(str(tmp_path / "p.parquet"))


def test_differences_equal_a_loop_over_the_same_resamples() -> None:
    first, second = classified(0), classified(1, skill=1.6)
    found = compare(first, second, bootstrap=40, seed=3)
    (weights,) = resample_weights(first.labels, 40, seed=3)
    looped = []
    for column in weights.T:
        rows = np.repeat(np.arange(120), column.astype(int))
        truth = first.labels[rows]
        looped.append(
            [reference.roc_auc_score(truth, one.probabilities[rows], multi_class="ovr") for one in (first, second)]
        )
    differences = np.diff(np.array(looped), axis=1).ravel()
    auroc = found["macro_auroc"]
    assert auroc.difference.value == pytest.approx(auroc.candidate - auroc.baseline, abs=1e-12)
    np.testing.assert_allclose(
        [auroc.difference.low, auroc.difference.high], np.percentile(differences, [2.5, 97.5]), atol=1e-6
    )
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    assert auroc.p_value == pytest.approx(min(1.0, 2 * (beyond + 1) / 41))


@pytest.mark.parametrize("make", [classified, marked, ranked])
def test_a_model_does_not_differ_from_itself_and_sides_can_be_changed(make) -> None:
    first, second = make(0), make(1)
    for one in compare(first, first, bootstrap=50).values():
        assert (one.difference.value, one.difference.low, one.difference.high) == (0, 0, 0)
        assert one.p_value == 1.0
    there, back = (compare(*pair, bootstrap=50) for pair in ((first, second), (second, first)))
    for name, one in there.items():
        assert one.difference.value == -back[name].difference.value
        assert one.difference.low == pytest.approx(-back[name].difference.high)
        assert one.p_value == back[name].p_value


def test_scores_are_those_of_the_public_functions() -> None:
    first, second = classified(0), classified(1)
    found = compare(first, second, bootstrap=0)
    assert tuple(found) == METRIC_NAMES
    for name, metric in classification(second.probabilities, second.labels, bootstrap=0).items():
        assert found[name].candidate == metric.value
        assert found[name].p_value is None
    concepts = compare(marked(0), marked(1), bootstrap=0)["mean_auroc"]
    assert concepts.baseline == mean_auroc(marked(0).scores, marked(0).marks, bootstrap=0)[0].value


def test_pairing_narrows_the_interval() -> None:
    first = classified(0, 400)
    noise = np.random.default_rng(9).normal(0, 0.05, first.probabilities.shape)
    logits = np.log(first.probabilities) + noise
    near = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    paired = compare(first, replace(first, probabilities=near.astype(np.float32)), bootstrap=300)["accuracy"].difference
    alone = classification(first.probabilities, first.labels, bootstrap=300)["accuracy"]
    assert paired.low is not None
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_p_values_of_equal_models_are_uniform_enough() -> None:
    """Of 200 pairs of equally good models about one in twenty differs at the level of 0.05."""
    found = [
        compare(classified(2 * n, 100), classified(2 * n + 1, 100), bootstrap=199)["accuracy"].p_value
        for n in range(200)
    ]
    # The binomial interval of 99.9 % around 10 of 200, whatever the seeds are.
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= sum(one <= 0.05 for one in found) <= high
    assert 0.4 < np.mean(found) < 0.62


def test_a_rank_that_grows_is_a_model_that_gets_worse() -> None:
    grown = Difference(5.0, 7.0, Metric(2.0, 1.0, 3.0), 0.01)
    assert grown.is_worse("image_to_text_mean_rank")
    assert grown.is_better("image_to_text_R@1")
    by_chance = replace(grown, p_value=0.2)
    assert not by_chance.is_worse("text_to_image_median_rank")
    assert not by_chance.is_better("accuracy")


def test_p_value_is_never_nought_and_undefined_resamples_do_not_count() -> None:
    assert Distribution(1.0, np.ones(99)).p_value() == pytest.approx(0.02)
    assert Distribution(1.0, np.array([np.nan, 1.0, 1.0, 1.0])).p_value() == pytest.approx(0.5)
    assert Distribution(1.0, np.empty(0)).p_value() is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda p: replace(p, sample_ids=["x", *p.sample_ids[1:]]), "number 0: s0 and x"),
        (lambda p: replace(p, sample_ids=p.sample_ids[:-1]), "120 and 119"),
        (lambda p: replace(p, classes=(*p.classes[1:], "other")), "other classes"),
        (lambda p: replace(p, labels=p.labels[::-1]), "other labels"),
        (lambda p: replace(p, setting="10 images a class"), "other settings"),
        (lambda p: marked(0), "other kinds"),
    ],
)
def test_what_is_not_of_the_same_samples_is_refused(other, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(classified(0), other(classified(1)))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three saved reports: two models on one split, and one on another corpus."""
    folder = tmp_path_factory.mktemp("compare")
    write_prepared_corpus(folder / "one", {"train": 48, "val": 40})
    write_prepared_corpus(folder / "other", {"train": 48, "val": 39})
    found = {}
    for name, corpus, digest, noise in (("a", "one", "1", 0.0), ("b", "one", "2", 2.0), ("c", "other", "1", 0.0)):
        config = EvaluateConfig(
            model="m", corpus=str(folder / corpus), output="o", bootstrap=30, num_draws=2, min_group_size=5, shots=(1,)
        )
        samples, train = (Samples.load(config.corpus or "", split) for split in ("val", "train"))
        texts = [text for task in ours() for text in scorer(task).texts(samples, config)]
        features = features_of(samples, texts)
        shifted = features.images + np.random.default_rng(0).normal(0, noise / np.sqrt(32), features.images.shape)
        unit = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
        features = replace(
            features, images=unit.astype(np.float32), info=replace(INFO, name=name, model_digest=digest * 64)
        )
        context = Context(config, samples, features, (train, features_of(train, [])))
        report = build(
            context, {task: scorer(task).run(context) for task in ours()}, model_uri=f"models/{name}", duration_s=1.0
        )
        report.save(str(folder / f"report-{name}"))
        found[name] = str(folder / f"report-{name}")
    return found


def test_saved_predictions_of_every_task_give_the_reported_scores(reports: dict[str, str]) -> None:
    document = json.loads((Path(reports["a"]) / "report.json").read_text())
    for task in ours():
        found, origin = predictions.read(f"{reports['a']}/{document['tasks'][task]['predictions']}")
        assert origin.task == task
        assert len(found.sample_ids) == document["tasks"][task]["num_samples"]
        # A mean over draws is not the score of the one draw whose predictions are kept.
        if task != "few_shot":
            for name, one in compare(found, found, bootstrap=0).items():
                prefix = found.prefix if isinstance(found, ClassPredictions) else ""
                if prefix + name in document["tasks"][task]["metrics"]:
                    reported = document["tasks"][task]["metrics"][prefix + name]["value"]
                    assert one.baseline == pytest.approx(reported, abs=1e-6), (task, name)


def test_job_sets_reports_side_by_side(reports: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = f"reports=[{reports['a']},{reports['b']}]"
    assert job.main([pair, f"output={tmp_path / 'out'}", "bootstrap=200", "tracking.uri=sqlite:///runs.db"]) == 0
    printed = capsys.readouterr().out
    assert "zero_shot accuracy: b -0." in printed
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["names"] == ["a", "b"]
    tasks = document["comparisons"][""]["tasks"]
    assert set(tasks) == set(ours())
    row = tasks["zero_shot"]["metrics"]["accuracy"]
    assert row["differences"][0] is None
    one = row["differences"][1]
    assert one["worse"]
    assert one["p_value"] < 0.05
    assert one["difference"]["high"] < 0
    assert one["difference"]["value"] == pytest.approx(row["scores"][1]["value"] - row["scores"][0]["value"])
    assert document["comparisons"][""]["tasks"]["zero_shot"]["groups"]["skin_type"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "b minus a" in page
    assert "refresh" not in page

    import mlflow

    client = mlflow.MlflowClient(tracking_uri="sqlite:///runs.db")
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.data.tags["dermray.kind"] == "compare"
    assert found.data.metrics["zero_shot/accuracy_difference_1"] == pytest.approx(one["difference"]["value"])


def test_tasks_without_predictions_or_with_scores_of_their_own_stand_side_by_side(
    reports: dict[str, str], tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(reports[name], tmp_path / name)
        file = tmp_path / name / "report.json"
        document = json.loads(file.read_text())
        tasks = {task: document["tasks"][task] for task in ("knn", "zero_shot")}
        if name == "b":
            tasks["knn"] |= {"predictions": None}
        tasks["zero_shot"] |= {"metrics": {"own": {"value": 0.5, "low": None, "high": None}}, "headline": ["own"]}
        file.write_text(json.dumps({**document, "tasks": tasks}))
    found = run(CompareConfig(reports=(str(tmp_path / "a"), str(tmp_path / "b")), output="o", bootstrap=20))
    tasks = found.document["comparisons"][""]["tasks"]
    for task, name in (("knn", "accuracy"), ("zero_shot", "own")):
        row = tasks[task]["metrics"][name]
        assert row["differences"] == [None, None]
        assert len(row["scores"]) == 2
        assert tasks[task]["num_samples"] == 40
    assert found.metrics() == {}
    assert found.headline() == [f"{task}: no score that the predictions hold" for task in ("knn", "zero_shot")]
    assert "Nearest neighbours" in found.html
    for name in ("a", "c"):
        file = tmp_path / name / "report.json"
        document = json.loads(file.read_text())
        file.write_text(json.dumps({**document, "tasks": {"knn": document["tasks"]["knn"]}}))
    with pytest.raises(EvaluationError, match="not comparable: the corpus digest is"):
        run(CompareConfig(reports=(str(tmp_path / "a"), str(tmp_path / "c")), output="o"))


def test_scores_of_other_predictors_are_told_and_no_ground_for_promotion(
    reports: dict[str, str], tmp_path: Path
) -> None:
    """What a report of an earlier build does not say is as its tasks had it."""

    def saved(name: str, predictors: dict[str, str], keys: dict[str, dict[str, float]]) -> str:
        shutil.copytree(reports["a"], tmp_path / name)
        file = tmp_path / name / "report.json"
        document = json.loads(file.read_text())
        for task, section in document["tasks"].items():
            section.pop("predictor", None)
            section |= {"predictor": predictors[task]} if task in predictors else {}
        document["config"] |= {"predictor": predictors, "predictor_keys": keys}
        file.write_text(json.dumps(document))
        return str(tmp_path / name)

    whole = json.loads((Path(reports["a"]) / "report.json").read_text())
    assert {name: one.get("predictor", "") for name, one in whole["tasks"].items()}["knn"] == "knn"
    earlier, probed = saved("earlier", {}, {}), saved("probed", {"knn": "linear_probe"}, {})
    first, second = (saved(f"keys{n}", {"knn": "lab:VOTE"}, {"knn": {"k": n}}) for n in (1, 2))
    told = {
        (reports["a"], earlier): [],
        (reports["a"], probed): ["predictor.knn is linear_probe, the champion's knn"],
        (probed, earlier): ["predictor.knn is knn, the champion's linear_probe"],
        (first, second): ["predictor_keys.knn.k is 2, the champion's 1"],
        (first, earlier): [
            "predictor.knn is knn, the champion's lab:VOTE",
            "predictor_keys.knn.k is None, the champion's 1",
        ],
    }
    for pair, reasons in told.items():
        assert gate.mismatches(*(gate.load_report(uri) for uri in pair)) == reasons
        found = run(CompareConfig(reports=pair, output="o", bootstrap=0)).document["comparisons"][""]
        assert found["differing"] == (["predictors"] if reasons else [])


def test_scores_by_other_options_are_told_and_no_ground_for_promotion(reports: dict[str, str], tmp_path: Path) -> None:
    """A report says by which; of an earlier build its keys do, and what it does not say is taken as the other's."""

    def saved(name: str, change: Callable[[dict[str, Any]], object]) -> str:
        shutil.copytree(reports["a"], tmp_path / name)
        file = tmp_path / name / "report.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))
        return str(tmp_path / name)

    def earlier(document: dict[str, Any], **config: object) -> None:
        for section in document["tasks"].values():
            del section["options"]
        document["config"] |= config

    options = json.loads((Path(reports["a"]) / "report.json").read_text())["tasks"]["knn"]["options"]
    assert options == {"neighbours": 20, "train_split": "train"}
    three = saved("three", lambda document: document["tasks"]["knn"]["options"].update(neighbours=3))
    same = saved("same", earlier)
    split = saved("split", lambda document: earlier(document, train_split="train-b"))
    silent = saved("silent", lambda document: (earlier(document), document["config"].pop("neighbours")))
    reasons = {
        three: ["neighbours of knn is 3, the champion's 20"],
        same: [],
        split: ["train_split of knn is train-b, the champion's train"],
        silent: [],
    }
    for uri, expected in reasons.items():
        both = gate.load_report(reports["a"]), gate.load_report(uri)
        assert [one for one in gate.mismatches(*both) if "knn" in one] == expected
        warned = ["the candidate's report does not say neighbours of knn: taken as the other's, 20"]
        assert gate.not_compared(*both) == (warned if uri == silent else [])
    found = run(CompareConfig(reports=(reports["a"], three), output="o", bootstrap=0)).document["comparisons"][""]
    assert found["differing"] == ["neighbours of knn (20, 3)"]


def test_library_compares_a_task_of_two_reports(reports: dict[str, str]) -> None:
    found = compare_reports(reports["b"], reports["a"], "zero_shot", bootstrap=200)
    assert found["accuracy"].is_better("accuracy")
    assert not found["accuracy"].is_worse("accuracy")
    with pytest.raises(EvaluationError, match="the corpus digest is"):
        compare_reports(reports["a"], reports["c"], "zero_shot")
    with pytest.raises(EvaluationError, match="no predictions of embroidery; it has those of: .*zero_shot"):
        compare_reports(reports["a"], reports["b"], "embroidery")
    with pytest.raises(EvaluationError, match=r"report\.json does not exist; run jobs/evaluate"):
        compare_reports(reports["a"], reports["a"] + "-gone", "zero_shot")


def test_predictions_of_a_later_broken_run_are_not_taken(reports: dict[str, str], tmp_path: Path) -> None:
    kept, _ = predictions.read(f"{reports['a']}/predictions/zero_shot.parquet")
    for name in ("report.json",):
        (tmp_path / name).write_bytes((Path(reports["a"]) / name).read_bytes())
    (tmp_path / "predictions").mkdir()
    predictions.write(str(tmp_path / "predictions" / "zero_shot.parquet"), kept, replace(ORIGIN, model_digest="9" * 64))
    with pytest.raises(EvaluationError, match="another model or corpus than report.json"):
        compare_reports(str(tmp_path), reports["b"], "zero_shot")


def test_suites_are_compared_by_data_set(reports: dict[str, str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        document = json.loads((Path(reports[name]) / "report.json").read_text())
        folder = tmp_path / name
        for file in Path(reports[name]).rglob("*.*"):
            target = folder / "one" / file.relative_to(reports[name])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        summary = {
            "benchmarks": {"suite/one": {"report": "one/report.json"}},
            "model": document["model"],
            "skipped": [],
        }
        SuiteReport(summary, "<!doctype html>", {}).save(str(folder))
    found = run(CompareConfig(reports=(str(tmp_path / "a"), str(tmp_path / "b")), output="o", bootstrap=20))
    assert list(found.document["comparisons"]) == ["suite/one"]
    assert "suite/one/zero_shot/accuracy_difference_1" in found.metrics()
    with pytest.raises(EvaluationError, match="compare like with like"):
        run(CompareConfig(reports=(str(tmp_path / "a"), reports["b"]), output="o"))


def test_one_report_or_the_same_twice_is_refused(reports: dict[str, str]) -> None:
    from dermray.config import parse

    for given in (f"reports=[{reports['a']}]", f"reports=[{reports['a']},{reports['a']}/]"):
        with pytest.raises(ConfigError, match="reports"):
            parse(CompareConfig, [given, "output=o"])


def test_reports_of_an_earlier_version_compare_and_gate_as_they_did(tmp_path: Path) -> None:
    with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "evaluations.zip") as archive:
        archive.extractall(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    reports = (str(tmp_path / "champion"), str(tmp_path / "candidate"))
    found = run(CompareConfig(reports=reports, output="o", bootstrap=100))
    assert found.metrics() == pytest.approx(expected["differences"], abs=1e-9, nan_ok=True)
    assert found.document["comparisons"][""]["differing"] == []
    before, after = (gate.load_report(uri) for uri in reports)
    assert gate.mismatches(before, after) == []
    verdicts = gate.compare(before, after, margin=0.02)
    for one, before in zip(verdicts, expected["verdicts"], strict=True):
        assert one.to_json() == pytest.approx(before, abs=1e-9), one.name
