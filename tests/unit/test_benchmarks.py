"""Benchmarks as data: every file is whole, tables are found and read as published, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dermray.config import parse
from dermray.errors import ConfigError, CorpusError, EvaluationError, SplitError
from dermray.evaluate import benchmarks, cases, suite
from dermray.evaluate.cases import Case, Skipped
from dermray.evaluate.classes import classes_of
from dermray.evaluate.concepts import concepts_of
from dermray.evaluate.report import build, summarise
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tables import Layout, RawTable, find
from dermray.evaluate.tasks import kinds
from dermray.evaluate.tasks.contract import Context, scorer
from dermray.predict.zero_shot import TEMPLATES
from dermray.vectors.embedding.units import ImageFiles
from tests.corpora import jpeg, write_prepared_corpus
from tests.evaluation import features_of

GOLDEN = Path(__file__).parent.parent / "golden"
ALL = [
    one
    for name in ("derm1m", "make", "o_make", "panderm", "derm1m_linear_probe")
    for one in benchmarks.load(name).benchmarks
]


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg((200, 60, 50), seed=number))


def write_table(path: Path, header: str, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def config(**settings: object) -> EvaluateConfig:
    return EvaluateConfig(model="m", output="o", **settings)  # type: ignore[arg-type]


def scored(case: Case) -> Context:
    training = (case.training, features_of(case.training, [])) if case.training else None
    settings = case.config.model_copy(update={"bootstrap": 20, "num_draws": 2, "shots": (1,)})
    texts = [text for name in case.tasks for text in scorer(name).texts(case.samples, settings)]
    return Context(settings, case.samples, features_of(case.samples, texts), training)


def test_the_suites_are_those_of_the_publications() -> None:
    short = {
        name: [one.name.partition("/")[2] for one in benchmarks.load(name).benchmarks] for name in ("derm1m", "make")
    }
    assert short["derm1m"] == [
        *("ham10000", "pad_ufes_20", "fitzpatrick17k", "daffodil", "skincon", "derm7pt", "holdout", "skincap")
    ]
    assert short["make"] == ["pad_ufes_20", "fitzpatrick17k", "snu_134", "sd_128", "skincon", "derm7pt", "skincap"]
    assert len(benchmarks.load("panderm").benchmarks) == 9
    assert len(benchmarks.names()) == len(set(benchmarks.names()))


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_every_benchmark_is_whole(one: benchmarks.Benchmark) -> None:
    assert set(one.tasks) <= set(kinds.ours())
    assert len(set(one.classes)) == len(one.classes)
    assert one.dataset.citation
    assert one.dataset.offered.startswith("http")
    assert one.table.image
    assert one.table.paths or one.table.folder
    for published in one.published:
        assert published.reference
        assert published.scores
        for metric, score in published.scores.items():
            assert metric.partition("/")[0] in one.tasks, metric
            assert 0 < score < 1
    for metric in one.metrics:
        assert metric.partition("/")[0] in one.tasks, metric
    if "zero_shot" in one.tasks:
        assert one.classes
    if any(kinds.find(task).learns for task in one.tasks):
        assert one.table.split
        assert one.split == "test"


def test_class_lists_are_the_published_ones() -> None:
    for name, golden in (("derm1m/ham10000", "zero_shot_ham7"), ("derm1m/daffodil", "zero_shot_daffodil5")):
        facts = json.loads((GOLDEN / f"{golden}.json").read_text())
        assert list(benchmarks.load(name).benchmarks[0].classes) == facts["config"]["classes"]
        assert list(TEMPLATES) == facts["templates"]
    counts = {one.name: len(one.classes) for one in ALL if one.classes}
    assert counts["derm1m/pad_ufes_20"] == 6
    assert counts["derm1m/fitzpatrick17k"] == counts["make/fitzpatrick17k"] == 114
    assert (counts["make/snu_134"], counts["make/sd_128"]) == (134, 128)
    assert (counts["o_make/sd_tails_70"], counts["o_make/snu_tails_85"]) == (70, 85)
    classes = {one.name: set(one.classes) for one in ALL}
    assert not classes["o_make/sd_tails_70"] & classes["make/sd_128"]
    assert classes["o_make/snu_tails_85"] < classes["make/snu_134"]


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no benchmark is named 'derm2m'; there are: derm1m, derm1m/ham10000"):
        benchmarks.load("derm2m")
    with pytest.raises(ConfigError, match="derm1m/nothing"):
        benchmarks.load("derm1m/nothing")


@pytest.mark.parametrize("place", ["meta-files/zs", "data/meta-files/zs", "deep/down"])
@pytest.mark.parametrize("path", ["data/PAD/images/{}", "PAD/images/{}", "images/{}", "{}"])
def test_a_published_table_is_found_and_its_images_too(tmp_path: Path, place: str, path: str) -> None:
    images = [f"PAT_{number}.png" for number in range(7)]
    write_images(tmp_path / "data" / "PAD" / "images", images)
    rows = [f"{path.format(name)},{number},x" for number, name in enumerate(images)]
    write_table(tmp_path / place / "pad-zero-shot-test.csv", "image_path,label,diag", rows)
    _, (case,) = cases.of_suite(config(benchmark="derm1m/pad_ufes_20", data=str(tmp_path)))
    assert isinstance(case, Case)
    assert case.samples.labels[2] == ["actinic keratosis"]
    assert len(case.samples.read_images(list(range(7)))) == 7
    classes = classes_of(case.samples)
    assert classes.targets.tolist() == [0, 1, 2, 3, 4, 5, -2]
    assert classes.excluded() == {"without a label": 0, "label outside the class list": 1}


def test_concepts_are_the_columns_of_the_published_table(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "skincon" / "final_images", [f"{n}.png" for n in range(4)])
    rows = ["0.png,1,0,0", "1.png,0,1,0", "2.png,1,1,0", "3.png,0,0,0"]
    write_table(tmp_path / "data" / "skincon" / "meta.csv", "ImageID,papule,scale,glitter", rows)
    _, (case,) = cases.of_suite(config(benchmark="make/skincon", data=str(tmp_path)))
    assert isinstance(case, Case)
    result = scorer("concepts").run(scored(case))
    assert [row["name"] for row in result.details["concepts"]] == ["papule", "scale"]
    assert [row["num_samples"] for row in result.details["concepts"]] == [2, 2]
    assert result.details["concepts_without_terms"] == ["glitter"]


def test_a_linear_probe_table_has_splits(tmp_path: Path) -> None:
    images = [f"ISIC_{number}.jpg" for number in range(18)]
    write_images(tmp_path / "ddi" / "images", images)
    splits = ["train"] * 10 + ["val"] * 2 + ["test"] * 6
    rows = [f"{name},{number % 2},{split}" for number, (name, split) in enumerate(zip(images, splits, strict=True))]
    write_table(tmp_path / "ddi" / "anything.csv", "image,binary_label,split", rows)
    _, (case,) = cases.of_suite(config(benchmark="panderm/ddi", data=str(tmp_path)))
    assert isinstance(case, Case)
    assert case.training is not None
    assert (len(case.samples), len(case.training)) == (6, 10)
    assert case.tasks == ("linear_probe", "knn", "few_shot")
    result = scorer("linear_probe").run(scored(case))
    assert [one["num_labels"] for one in result.details["fractions"]] == [2, 2, 10]
    write_table(tmp_path / "ddi" / "another.csv", "image", ["x"])
    with pytest.raises(CorpusError, match="holds 2 tables"):
        cases.of_suite(config(benchmark="panderm/ddi", data=str(tmp_path)))


def test_a_prepared_corpus_may_stand_for_the_published_table(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "pad_ufes_20", {"train": 16, "test": 24})
    found = cases.of_suite(config(benchmark="derm1m", data=str(tmp_path)))[1]
    (case,) = [one for one in found if isinstance(one, Case)]
    assert case.benchmark is not None
    assert case.benchmark.name == "derm1m/pad_ufes_20"
    assert case.samples.split == "test"
    classes = classes_of(case.samples)
    assert classes.names[0] == "nevus"
    # Eczema and psoriasis are no class of this benchmark.
    assert classes.excluded()["label outside the class list"] == 12
    alone = cases.of_suite(config(benchmark="derm1m/pad_ufes_20", data=str(tmp_path / "pad_ufes_20")))[1]
    assert isinstance(alone[0], Case)


def test_a_prepared_corpus_is_asked_for_the_concepts_of_the_benchmark(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "derm7pt", {"train": 8, "test": 8})
    _, (case,) = cases.of_suite(config(benchmark="make/derm7pt", data=str(tmp_path)))
    assert isinstance(case, Case)
    known, unknown = concepts_of(case.samples)
    assert len(known) == 7
    assert unknown == []
    # The test corpus marks colours only, so none of the seven has an area.
    with pytest.raises(EvaluationError, match="no concept is marked on some of the images"):
        scorer("concepts").run(scored(case))


def test_what_is_missing_is_named_with_where_it_is_offered(tmp_path: Path) -> None:
    write_images(tmp_path / "PAD" / "images", ["a.png"])
    write_table(tmp_path / "PAD" / "MAKE_PAD.csv", "filename,label", ["a.png,0"])
    loaded, found = cases.of_suite(config(benchmark="make", data=str(tmp_path)))
    skipped = [one for one in found if isinstance(one, Skipped)]
    assert len(skipped) == len(loaded.benchmarks) - 1
    lines = " ".join(map(str, skipped))
    assert "make/snu_134: its table SNU/MAKE_SNU.csv is not below" in lines
    assert "figshare.com/articles/dataset/SNU_dataset/6454802" in lines
    report = summarise(loaded, {}, skipped, config=config(benchmark="make", data="d"), duration_s=1.0)
    assert len(report.document["skipped"]) == 6
    assert any(line.startswith("skipped make/snu_134: its table SNU/MAKE_SNU.csv is not") for line in report.headline())
    assert "6454802" in report.html
    assert "drive.google.com" in report.html
    with pytest.raises(
        CorpusError, match=r"holds no data of MAKE: seven evaluation data sets: make/pad_ufes_20.*drive"
    ):
        cases.of_suite(config(benchmark="make", data=str(tmp_path / "nothing")))


def test_a_table_without_its_images_is_missing_too(tmp_path: Path) -> None:
    write_table(tmp_path / "MAKE_PAD.csv", "filename,label", ["a.png,0"])
    with pytest.raises(CorpusError, match=r"none of the first images of .*MAKE_PAD.csv \(a.png, …\) is found"):
        cases.of_suite(config(benchmark="make/pad_ufes_20", data=str(tmp_path)))


def test_a_column_that_lacks_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "MAKE_PAD.csv", "filename,klass", ["a.png,0"])
    with pytest.raises(CorpusError, match=r"has no column 'label'; its columns are: filename, klass"):
        cases.of_suite(config(benchmark="make/pad_ufes_20", data=str(tmp_path)))


def own(tmp_path: Path, header: str, rows: list[str], **settings: object) -> Case:
    write_images(tmp_path, [f"{number}.jpg" for number in range(len(rows))])
    table = write_table(tmp_path / "own.csv", header, [f"{number}.jpg,{row}" for number, row in enumerate(rows)])
    return cases.of_config(config(data=str(table), **settings))


def test_a_table_of_names_is_enough(tmp_path: Path) -> None:
    case = own(tmp_path, "image,label", ["nevus", "melanoma", "nevus", ""])
    assert case.tasks == ("zero_shot",)
    assert classes_of(case.samples).names == ("melanoma", "nevus")
    result = scorer("zero_shot").run(scored(case))
    assert result.num_samples == 3
    assert result.excluded["without a label"] == 1
    assert result.metrics["accuracy"].value == 1.0


def test_numbers_count_in_the_given_classes(tmp_path: Path) -> None:
    case = own(tmp_path, "image,label", ["1", "0.0", "2"], classes=("melanoma", "nevus"))
    assert case.samples.labels == [["nevus"], ["melanoma"], ["2"]]
    assert classes_of(case.samples).targets.tolist() == [1, 0, -2]


def test_captions_splits_and_other_names_of_columns(tmp_path: Path) -> None:
    rows = [f"c{number % 2},{'train' if number < 6 else 'test'},a red patch {number}" for number in range(10)]
    case = own(tmp_path, "image,label,split,caption", rows)
    assert case.tasks == ("zero_shot", "retrieval", "linear_probe", "knn", "few_shot")
    assert (case.samples.split, len(case.samples)) == ("test", 4)
    other = own(tmp_path, "image,dx,part,caption", rows, columns={"label": "dx", "split": "part"}, split="train")
    assert len(other.samples) == 6
    with pytest.raises(CorpusError, match="has no column 'dx'"):
        own(tmp_path, "image,label,split,caption", rows, columns={"label": "dx"})
    with pytest.raises(SplitError, match=r"no rows of the split 'val'; it has: train \(6\), test \(4\)"):
        own(tmp_path, "image,label,split,caption", rows, split="val")


def test_numbers_without_names_can_only_be_learnt(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"give their names with classes=\[…\]"):
        own(tmp_path, "image,label", ["0", "1"])
    case = own(tmp_path, "image,label,split", ["0,train", "1,train", "0,test", "1,test"])
    assert case.tasks == ("linear_probe", "knn", "few_shot")


def test_a_disease_tree_brings_levels_and_synonyms(tmp_path: Path) -> None:
    tree = {"root": ["neoplastic"], "neoplastic": ["nevus, mole", "melanoma"]}
    (tmp_path / "ontology.json").write_text(json.dumps(tree))
    case = own(tmp_path, "image,label", ["nevus", "melanoma", "nevus"], ontology=str(tmp_path / "ontology.json"),
               classes=("melanoma", "nevus"))  # fmt: skip
    result = scorer("zero_shot").run(scored(case))
    assert result.details["num_samples_by_level"] == {"1": 3, "2": 3}
    assert result.metrics["level_1_accuracy"].value == 1.0
    assert "synonyms_accuracy" in result.metrics


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("image,label\n", "no rows"), ("image,image\na,b\n", "repeats the column 'image'")],
)
def test_a_table_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.csv").write_text(content)
    with pytest.raises(CorpusError, match=message):
        RawTable.read(str(tmp_path / "own.csv"), Layout(image=("image",)))
    with pytest.raises(CorpusError, match="does not exist"):
        RawTable.read(str(tmp_path / "other.csv"), Layout(image=("image",)))


def test_a_lost_image_is_left_out_of_what_is_read(tmp_path: Path) -> None:
    case = own(tmp_path, "image,label", ["nevus", "melanoma", "nevus"])
    (tmp_path / "1.jpg").unlink()
    assert set(case.samples.read_images([0, 1, 2])) == {0, 2}
    (unit,) = case.samples.images
    assert isinstance(unit, ImageFiles)
    assert [data is None for data in unit.read()] == [False, True, False]


def test_tables_are_looked_for_only_where_needed(tmp_path: Path) -> None:
    assert find(str(tmp_path), ["a/b.csv"]) is None
    write_table(tmp_path / "x" / "a" / "b.csv", "image", [])
    assert find(str(tmp_path), ["a/b.csv"]) == f"{tmp_path}/x/a/b.csv"
    # The end of a path is whole folders, not letters.
    assert find(str(tmp_path), ["b.csv", "a/b.csv"]) == f"{tmp_path}/x/a/b.csv"
    assert find(str(tmp_path), ["b/b.csv"]) is None


def test_the_report_sets_ours_beside_the_published(tmp_path: Path) -> None:
    write_images(tmp_path / "HAM", [f"{n}.jpg" for n in range(14)])
    rows = [f"HAM/{number}.jpg,{number % 7}" for number in range(14)]
    write_table(tmp_path / "meta-files/zs/HAM-official-7-zero-shot-test.csv", "image_path,label", rows)
    loaded, (case,) = cases.of_suite(config(benchmark="derm1m/ham10000", data=str(tmp_path)))
    assert isinstance(case, Case)
    context = scored(case)
    report = build(
        context,
        {"zero_shot": scorer("zero_shot").run(context)},
        model_uri="m",
        duration_s=1.0,
        benchmark=case.benchmark,
    )
    compared = report.document["benchmark"]
    assert compared["metrics"] == ["zero_shot/accuracy", "zero_shot/macro_auroc"]
    assert compared["rows"][0]["model"] == "tiny"
    by_model = {row["model"]: row for row in compared["rows"][1:]}
    assert by_model["DermLIP ViT-B/16"]["scores"]["zero_shot/accuracy"]["value"] == 0.6813
    assert "0.6813" in report.html
    assert "be77240" in report.html
    summary = summarise(loaded, {"derm1m/ham10000": report}, [], config=case.config, duration_s=1.0)
    summary.save(str(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["benchmarks"]["derm1m/ham10000"]["report"] == "ham10000/report.json"
    assert (tmp_path / "out" / "ham10000" / "report.html").exists()
    assert 'href="ham10000/report.html"' in (tmp_path / "out" / "report.html").read_text()
    assert "ham10000/zero_shot/accuracy" in summary.metrics()
    assert summary.headline()[0].startswith("ham10000: zero_shot (14 samples)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give corpus="),
        (["corpus=c", "data=d"], "either corpus="),
        (["benchmark=derm1m"], "give corpus="),
        (["data=d", "classes=[a, b, a]"], "'a' is given more than once"),
        (["data=d", "label_fractions=[0.1, 2]"], "at most at 1, not at 2"),
        (["data=d", "shots=[0]"], "at least one image"),
    ],
)
def test_configurations_that_make_no_sense(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(EvaluateConfig, ["model=m", "output=o", *arguments])


def test_inputs_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no data of"):
        suite.check_inputs(config(benchmark="derm1m", data=str(tmp_path)))
    with pytest.raises(ConfigError, match="no benchmark is named"):
        suite.check_inputs(config(benchmark="x", data=str(tmp_path)))


def test_a_path_that_climbs_out_of_the_tables_folder_costs_its_row(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for file in (folder / "a.jpg", folder / "deep" / "b.jpg", tmp_path / "victim.jpg"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"jpeg")
    names = ["a.jpg", "../victim.jpg", "deep/../a.jpg", "./deep//b.jpg", "deep/../../victim.jpg"]
    (folder / "own.csv").write_text("image,label\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8")
    samples = RawTable.read(str(folder / "own.csv"), Layout(image=("image",), label=("label",))).samples(None)
    assert samples.ids == ["a.jpg", "deep/../a.jpg", "./deep//b.jpg"]
    assert [uri for unit in samples.images for uri in unit.uris] == [  # type: ignore[union-attr]
        *(str(folder / name) for name in ("a.jpg", "a.jpg", "deep/b.jpg"))
    ]
    assert samples.dropped == {"image path leads out of the folder": 2}
