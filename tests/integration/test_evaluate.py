"""The evaluation job end to end on Ray: a tiny random model on a small prepared corpus."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from mlflow import MlflowClient

from dermray import images, storage
from dermray.commands import compare as compare_job
from dermray.commands import evaluate as job
from dermray.commands import sweep
from dermray.config import TrackingConfig, parse
from dermray.errors import ConfigError, CorpusError, EvaluationError, ModelError
from dermray.evaluate import benchmarks, features, predictions, suite
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.release import gate
from dermray.tracking import lineage
from tests import darkness
from tests.conftest import ROOT
from tests.corpora import jpeg, write_image_encoder, write_model, write_prepared_corpus

pytestmark = pytest.mark.ray

BROKEN = [5, 17]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model = write_model(folder / "model")
    write_prepared_corpus(folder / "corpus", {"train": 16, "val": 44}, broken=BROKEN, unlabelled=[2])
    return {"model": str(model), "corpus": str(folder / "corpus")}


@pytest.fixture(scope="module")
def reports(ray_cluster, inputs, tmp_path_factory):
    """The same evaluation on one actor and on two, with other batch sizes, each with a cache of its own."""
    settings = [{"num_actors": 1, "batch_size": 64}, {"num_actors": 2, "batch_size": 3}]
    caches = [str(tmp_path_factory.mktemp("cache")) for _ in settings]
    return [
        suite.evaluate(EvaluateConfig(output="unused", bootstrap=100, cache=cache, **inputs, **one))
        for cache, one in zip(caches, settings, strict=True)
    ]


def test_same_numbers_whatever_actors_and_batch_size(reports):
    one, two = (report.metrics() for report in reports)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-5), name
    assert [report.document["engine"]["num_actors"] for report in reports] == [1, 2]
    assert [report.document["engine"]["num_images_encoded"] for report in reports] == [44, 44]


def test_another_run_reads_what_is_kept(reports, inputs):
    config = reports[0].document["config"]
    settings = {"bootstrap": 100, "cache": config["cache"], "batch_size": 64, "num_actors": 1}
    said = []
    again = suite.evaluate(EvaluateConfig(output="unused", **inputs, **settings), say=said.append)
    assert again.document["engine"]["num_images_encoded"] == again.document["engine"]["num_actors"] == 0
    assert again.metrics() == reports[0].metrics()
    assert said[0].startswith("vectors of 44 images and ")


def test_broken_images_are_counted_and_left_out(reports):
    document = reports[0].document
    assert document["engine"]["failed_images"] == {"not_an_image": len(BROKEN)}
    zero_shot, retrieval = document["tasks"]["zero_shot"], document["tasks"]["retrieval"]
    assert zero_shot["num_samples"] == 44 - len(BROKEN) - 1
    assert zero_shot["excluded"] == {"without a label": 1, "image not readable": len(BROKEN)}
    assert retrieval["num_samples"] == 44 - len(BROKEN)
    assert retrieval["num_distinct_captions"] < retrieval["num_samples"]


def test_features_equal_the_encoder_in_process(ray_cluster, inputs, tmp_path):
    from dermray.vectors.encoder import Encoder

    samples = Samples.load(inputs["corpus"], "val")
    texts = ["a red patch", "a brown patch", "a red patch"]
    settings = {"model_uri": inputs["model"], "cache": str(tmp_path), "num_actors": 2}
    found, again = features.compute([samples, samples], texts, **settings)
    encoder = Encoder.load(inputs["model"], device="cpu")
    readable = [index for index in range(len(samples)) if index not in BROKEN]
    images = samples.read_images(readable)
    np.testing.assert_array_equal(np.flatnonzero(found.usable), readable)
    np.testing.assert_allclose(
        found.images[readable], encoder.encode_images([images[index] for index in readable]), atol=1e-5
    )
    np.testing.assert_allclose(found.of_texts(texts), encoder.encode_texts(texts), atol=1e-5)
    assert found.info == encoder.info
    np.testing.assert_allclose(again.images, found.images, atol=1e-6)
    pixels = np.stack([encoder.preprocess(images[index]) for index in readable[:3]])
    lengthy = encoder.encode_pixels(pixels, normalise=False)
    np.testing.assert_allclose(found.as_given()[readable[:3]], lengthy, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning")
def test_job_writes_the_report(ray_cluster, inputs, tmp_path, capsys):
    arguments = [f"{key}={value}" for key, value in inputs.items()]
    settings = ["bootstrap=20", "num_actors=1", "tracking.enabled=false", "max_samples=30"]
    assert job.main([*arguments, f"output={tmp_path / 'out'}", *settings]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"zero_shot \(27 samples\): accuracy \d", printed)
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["corpus"]["num_samples"] == 30
    assert document["config"]["bootstrap"] == 20
    assert "<!doctype html>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.long
def test_image_encoders_of_others_are_scored_where_no_text_is_asked_for(ray_cluster, inputs, tmp_path, capsys):
    tasks = ["linear_probe", "knn", "tests.centroids:centroids"]
    settings = ["bootstrap=20", "num_actors=1", "tracking.enabled=false", f"cache={tmp_path / 'cache'}"]
    for library in ("timm", "transformers"):
        model = write_image_encoder(tmp_path / library, library)
        asked = [f"model={model}", f"corpus={inputs['corpus']}", f"output={tmp_path / library / 'out'}", *settings]
        assert job.main([*asked, f"tasks=[{','.join(tasks)}]", "label_fractions=[1.0]"]) == 0
        document = json.loads((tmp_path / library / "out" / "report.json").read_text())
        assert [*document["tasks"]] == ["linear_probe", "knn", "centroids"]
        assert document["model"]["context_length"] == 0
        assert document["engine"]["num_images_encoded"] == 60
        page = (tmp_path / library / "out" / "report.html").read_text()
        assert "no texts" in page
        assert 'id="centroids"' in page
        with pytest.raises(EvaluationError, match=r"takes no texts.*tasks=\[linear_probe,knn,few_shot\]"):
            job.main([*asked, "tasks=[zero_shot]"])
    capsys.readouterr()


def test_a_task_of_ones_own_scores_a_predictor_that_is_no_clip_model(ray_cluster, inputs, tmp_path, capsys):
    """Risks from pixels: no encoder is loaded, and report, page, comparison and gate have the scores all the same."""
    asked = [f"corpus={inputs['corpus']}", "predictor.risk=tests.darkness:darkness"]
    others = {
        "dark": ["tasks=[tests.risk:risk,classification]", "predictor.classification=tests.colours:colours"],
        "bright": ["tasks=[tests.risk:risk]"],
    }
    splits = ["validation_split=train", "train_split=none"]
    settings = ["bootstrap=200", "num_actors=1", "batch_size=3", "tracking.enabled=false", "min_group_size=5"]
    documents = {}
    for name, weights in {"dark": [0.4, 0.3, 0.3], "bright": [-0.5, 0.0, 0.0]}.items():
        model = tmp_path / name
        model.mkdir()
        (model / darkness.WEIGHTS).write_text(json.dumps(weights))
        given = [f"model={model}", f"output={model / 'out'}", *asked, *others[name], *splits, *settings]
        assert job.main(given) == 0
        documents[name] = json.loads((model / "out" / "report.json").read_text())
        assert documents[name]["model"]["model_digest"] == storage.sha256(model / darkness.WEIGHTS)
    section = documents["dark"]["tasks"]["risk"]
    assert (section["predictor"], section["num_samples"]) == ("tests.darkness:darkness", 44 - len(BROKEN) - 1)
    assert section["excluded"] == {"without a label": 1, "image not readable": len(BROKEN)}
    assert documents["dark"]["engine"]["num_images_encoded"] == 0
    classified = documents["dark"]["tasks"]["classification"]
    assert (classified["predictor"], classified["excluded"]) == ("tests.colours:colours", section["excluded"])
    assert classified["metrics"]["accuracy"]["value"] == 1.0
    assert classified["calibration"]["temperature"]["num_samples"] == 16 - 2  # One is broken, one has no label.
    saved, origin = predictions.read(str(tmp_path / "dark" / "out" / "predictions" / "risk.parquet"))
    samples = Samples.load(inputs["corpus"], "val")
    looked = darkness.Look((0.4, 0.3, 0.3))
    rows = [samples.ids.index(one) for one in saved.sample_ids]
    pictures = samples.read_images(rows)
    expected = [looked([images.decode(data)])[0] for data in pictures.values()]
    np.testing.assert_allclose(saved.predicted["risk"], expected, rtol=1e-9)
    assert saved.truth["malignant"].tolist() == ["melanoma" in samples.labels[row] for row in rows]
    assert (origin.task, saved.scored_by) == ("risk", "tests.risk:risk")
    values = {name: {key: one["value"] for key, one in each["tasks"]["risk"]["metrics"].items()}
              for name, each in documents.items()}  # fmt: skip
    assert (values["dark"]["auroc"], values["bright"]["auroc"]) == (1.0, 0.0)
    page = (tmp_path / "dark" / "out" / "report.html").read_text()
    assert "Asked: tests.darkness:darkness." in page
    assert 'id="risk-groups"' in page
    compared = compare_job.main([f"reports=[{tmp_path}/dark/out,{tmp_path}/bright/out]",
                                 f"output={tmp_path / 'compared'}", "tracking.enabled=false"])  # fmt: skip
    assert compared == 0
    told = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    scores = told["comparisons"][""]["tasks"]["risk"]["metrics"]
    away = scores["distance"]["differences"][1]
    assert away["difference"]["value"] == pytest.approx(values["bright"]["distance"] - values["dark"]["distance"])
    assert (away["worse"], away["better"]) == (True, False)
    assert scores["auroc"]["differences"][1]["worse"]
    champion, candidate = (gate.load_report(f"{tmp_path}/{name}/out") for name in ("dark", "bright"))
    scored = ("risk.auroc", "risk.distance")
    verdicts = {one.name: one for one in gate.compare(champion, candidate, margin=0.02, metrics=scored)}
    assert {name: (one.is_worse, one.method) for name, one in verdicts.items()} == {
        "risk.auroc": (True, gate.PAIRED),
        "risk.distance": (True, gate.PAIRED),
    }
    assert not any(one.is_worse for one in gate.compare(champion, champion, margin=0.0))
    with pytest.raises(ModelError, match=r"holds no risk\.json"):
        job.main([f"model={tmp_path}", f"output={tmp_path / 'out'}", *asked, *others["bright"], *settings])
    capsys.readouterr()


DERM7PT = ("pigment network", "streaks", "pigmentation", "regression structures", "dots and globules",
           "blue whitish veil", "vascular structures")  # fmt: skip


def write_published_data(root):
    """A folder laid out as Derm1M's evaluation data is: four zero-shot tables, two of concepts, two of retrieval."""
    for table, folder, num_classes in (
        ("HAM-official-7-zero-shot-test", "HAM", 7),
        ("pad-zero-shot-test", "PAD", 6),
        ("f17k-113-zero-shot-test", "F17K", 114),
        ("daffodil-5-zero-shot-test", "Daffodil", 5),
    ):
        rows = [(f"data/{folder}/{number}.jpg", number % num_classes) for number in range(15)]
        write_rows(root / "meta-files" / "zs" / f"{table}.csv", ["image_path", "label"], rows)
        write_pictures(root, [path for path, _ in rows])
    for folder, concepts in (("skincon", ("papule", "scale")), ("derm7pt", DERM7PT)):
        rows = [(f"{number}.jpg", *(number >> bit & 1 for bit in range(len(concepts)))) for number in range(12)]
        write_rows(root / "data" / folder / "meta.csv", ["ImageID", *concepts], rows)
        write_pictures(root / "data" / folder / "final_images", [row[0] for row in rows])
    for folder, image, caption in (
        ("skincap", "filename", "caption_zh_polish_en"),
        ("Derm1M-hold_out", "filename", "truncated_caption"),
    ):
        rows = [(f"{number}.jpg", f"red patch number {number}") for number in range(9)]
        write_rows(root / "data" / folder / "meta.csv", [image, caption], rows)
        write_pictures(root / "data" / folder, [row[0] for row in rows])
    (root / "data" / "PAD" / "3.jpg").unlink()


def write_rows(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


def write_pictures(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg((60 + 10 * number, 90, 50), seed=number))


def test_benchmark_job_yields_every_table(ray_cluster, inputs, tmp_path, capsys):
    write_published_data(tmp_path)
    settings = ["bootstrap=20", "num_actors=1", "tracking.enabled=false", f"output={tmp_path / 'out'}"]
    assert job.main([f"model={inputs['model']}", "benchmark=derm1m", f"data={tmp_path}", *settings]) == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    metrics = {name.partition("/")[2]: one["benchmark"]["metrics"] for name, one in document["benchmarks"].items()}
    assert list(metrics) == [
        *("ham10000", "pad_ufes_20", "fitzpatrick17k", "daffodil", "skincon", "derm7pt", "holdout", "skincap")
    ]
    for name, one in zip(metrics, benchmarks.load("derm1m").benchmarks, strict=True):
        assert set(one.metrics) <= set(metrics[name])
    assert document["skipped"] == []
    pad = json.loads((tmp_path / "out" / "pad_ufes_20" / "report.json").read_text())
    assert pad["engine"]["failed_images"] == {"missing": 1}
    assert pad["tasks"]["zero_shot"]["excluded"]["image not readable"] == 1
    assert [row["name"] for row in pad["tasks"]["zero_shot"]["classes"]][:2] == ["nevus", "basal cell carcinoma"]
    concepts = json.loads((tmp_path / "out" / "skincon" / "report.json").read_text())["tasks"]["concepts"]
    assert [row["name"] for row in concepts["concepts"]] == ["papule", "scale"]
    printed = capsys.readouterr().out
    assert re.search(r"skincap: retrieval \(9 samples\): image_to_text_R@1", printed)
    assert "0.6813" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.long
def test_own_table_in_one_command_learns_and_names(ray_cluster, inputs, tmp_path):
    colours = {"melanoma": (30, 25, 25), "psoriasis": (235, 150, 160)}
    names = [list(colours)[number % 2] for number in range(24)]
    splits = ["train"] * 14 + ["test"] * 10
    write_rows(
        tmp_path / "own.csv",
        ["image", "label", "split"],
        [(f"{number}.jpg", name, split) for number, (name, split) in enumerate(zip(names, splits, strict=True))],
    )
    for number, name in enumerate(names):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(colours[name], seed=number))
    store = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    settings = [
        "bootstrap=20",
        "num_actors=1",
        "num_draws=2",
        f"tracking.uri={store.uri}",
        f"output={tmp_path / 'out'}",
    ]
    assert job.main([f"model={inputs['model']}", f"data={tmp_path / 'own.csv'}", *settings]) == 0
    chain = lineage.trace(str(tmp_path / "out"), store)
    (table,) = [node for node in chain.nodes.values() if node.kind == "table"]
    assert (table.uri, table.digest) == (str(tmp_path / "own.csv"), storage.sha256(tmp_path / "own.csv"))
    tasks = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]
    assert list(tasks) == ["zero_shot", "linear_probe", "knn", "few_shot"]
    # Even random towers tell black from pink.
    assert tasks["linear_probe"]["metrics"]["100pct_macro_auroc"]["value"] == 1.0
    assert tasks["knn"]["metrics"]["accuracy"]["value"] == 1.0
    assert tasks["few_shot"]["num_train_samples"] == 14


@pytest.mark.long
def test_a_sweep_chooses_the_cost_of_the_probe_by_the_validation_split(ray_cluster, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = [
        *("--config", "tune/spaces/linear_probe.yaml", f"overrides.model={inputs['model']}"),
        *(f"corpus={inputs['corpus']}", f"output={tmp_path / 'out'}", f"tracking.uri={store}"),
        *("space.probe_cost={low: 1.0e-4, high: 100, steps: 3}", f"overrides.cache={tmp_path / 'cache'}"),
        "overrides.num_actors=1",
    ]
    with pytest.raises(ConfigError, match="keep 'test' for what is chosen"):
        sweep.main([*arguments, "overrides.split=test"])
    assert sweep.main(arguments) == 0
    document = json.loads((tmp_path / "out" / "trials.json").read_text())
    score = document["objective"]
    by_cost = {trial["params"]["probe_cost"]: trial[score] for trial in document["trials"]}
    assert sorted(by_cost) == [1e-4, 0.1, 100.0]
    for trial in document["trials"]:
        report = json.loads((tmp_path / "out" / "trials" / trial["name"] / "report.json").read_text())
        assert report["tasks"]["linear_probe"]["metrics"]["100pct_balanced_accuracy"]["value"] == trial[score]
        assert report["corpus"]["split"] == "val"
    # Under so heavy a penalty all weights are 0, and every sample gets the commonest class.
    assert by_cost[1e-4] < max(by_cost.values()) == document["best_objective"]
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("dermray").experiment_id])
    kinds = sorted(run.data.tags["dermray.kind"] for run in runs)
    assert kinds == ["sweep", "trial", "trial", "trial"]
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/trials/*/report.json")}
    assert sweep.main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "what was scored is not scored again"
    best = parse(
        EvaluateConfig,
        ["--config", str(tmp_path / "out" / "best.yaml"), f"corpus={inputs['corpus']}", f"output={tmp_path / 'best'}"],
    )
    assert by_cost[best.probe_cost] == document["best_objective"]


def test_missing_split_and_model_are_said_before_any_work(inputs, tmp_path):
    with pytest.raises(CorpusError, match=r"no split 'test'; it has: train \(16\), val \(44\)"):
        suite.check_inputs(EvaluateConfig(output="o", split="test", **inputs))
    with pytest.raises(ModelError):
        suite.check_inputs(EvaluateConfig(output="o", **{**inputs, "model": str(tmp_path)}))


def test_damaged_weights_are_our_error(ray_cluster, inputs, tmp_path):
    model = write_model(tmp_path / "model")
    weights = model / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        suite.evaluate(EvaluateConfig(output="o", num_actors=1, **{**inputs, "model": str(model)}))


def test_a_lost_shard_is_named(ray_cluster, inputs, tmp_path):
    write_prepared_corpus(tmp_path / "corpus", {"val": 16})
    config = EvaluateConfig(output="o", num_actors=1, **{**inputs, "corpus": str(tmp_path / "corpus")})
    samples = Samples.load(config.corpus, "val")
    (shard,) = (tmp_path / "corpus" / "data").glob("*.parquet")
    shard.unlink()
    with pytest.raises(CorpusError, match=r"val-00000\.parquet is in the manifest but not there"):
        features.compute([samples], [], model_uri=inputs["model"], num_actors=1)
