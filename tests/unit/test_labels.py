"""Labels as clinics write them, in preparation and evaluation: folded alike, mapped, and told where they are lost."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from dermray.commands import prepare as prepare_job
from dermray.config import parse
from dermray.corpus.ontology import Ontology
from dermray.errors import ConfigError, CorpusError
from dermray.evaluate import telling
from dermray.evaluate.classes import classes_of
from dermray.evaluate.tables import Layout, RawTable
from dermray.prepare import pipeline, told
from dermray.prepare.amend import Amender
from dermray.prepare.reconcile import reconcile
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.raw.sources import READERS, SourceRequest
from dermray.raw.sources.rows import Columns
from tests.raw_sources import write_images, write_samples, write_table

ROOT = Path(__file__).parents[2]
TREE = (
    '{"root": ["tumours", "Urticaria"], "tumours": ["Basal cell carcinoma", "Melanocytic nevus", "Melanoma",'
    ' "Seborrheic keratosis"]}'
)
LAYOUT = Layout(image=("image",), label=("label",), caption=("caption",), optional=frozenset(("caption",)))


def clinic(folder: Path, labels: dict[str, int], tree: str | None = None) -> Path:
    rows = [{"label": label} for label, times in labels.items() for _ in range(times)]
    rows = [{"image": f"{number}.jpg", **row} for number, row in enumerate(rows)]
    write_table(folder / "metadata.csv", rows)
    write_images(folder, *(row["image"] for row in rows))
    if tree:
        (folder / "ontology.json").write_text(tree, encoding="utf-8")
    return folder


def config_of(folder: Path, *keys: str) -> PrepareConfig:
    return parse(PrepareConfig, ["source=csv", f"input={folder}", f"output={folder}-out", *keys])


def scored(folder: Path, **options: object) -> tuple[list[str], Counter[int]]:
    """Names of the classes that evaluation makes of a table, and samples of each."""
    samples = RawTable.read(str(folder / "metadata.csv"), LAYOUT).samples(None, **options)
    classes = classes_of(samples)
    return list(classes.names), Counter(classes.targets.tolist())


SPELLED = {"Melanoma": 3, "melanoma": 4, "MELANOMA ": 1, "Nevus": 4, "nevus": 4}


def test_one_folding_in_evaluation_and_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path / "raw", SPELLED)
    names, times = scored(folder)
    assert sorted(names) == ["Nevus", "melanoma"]
    assert sorted(times.values()) == [8, 8]
    work = pipeline.read(config_of(folder))
    assert sorted(work.ontology) == ["Nevus", "melanoma"]
    assert "there is no disease tree at input: 5 spellings of labels make 2 classes" in capsys.readouterr().out


def test_eighteen_spellings_without_a_tree_are_not_eighteen_classes(tmp_path: Path) -> None:
    labels = "Rodent ulcer|BCC|basal cell carcinoma|Mole|Naevus|nevus|Nevi|NV|AK|Solar keratosis|actinic keratoses"
    labels += "|Seb K|SEK|Seborrhoeic keratosis|SCC|cSCC|MEL|malignant melanoma"
    folder = clinic(tmp_path / "raw", dict.fromkeys(labels.split("|"), 1))
    assert len(scored(folder)[0]) == 6
    assert len(pipeline.read(config_of(folder)).ontology) == 6


def test_placeholders_are_no_classes_and_no_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"nan": 3, "None": 2, "unknown": 1, "N/A": 1, "": 1, "-1": 1, "blank": 1}
    folder = clinic(tmp_path / "raw", {"eczema": 5, "psoriasis": 3, **said})
    names, times = scored(folder)
    assert sorted(names) == ["eczema", "psoriasis"]
    assert times[-1] == sum(said.values())
    excluded = classes_of(RawTable.read(str(folder / "metadata.csv"), LAYOUT).samples(None)).excluded()
    told = {f"label {text.lower()!r} says nothing": count for text, count in said.items() if text}
    assert excluded == {"without a label": 1, **told}
    # In preparation also where the rows have captions of their own.
    labels = ["nan", "psoriasis", "NaN", "-1"]
    rows = [{"image": f"{number}.jpg", "caption": "A patch.", "label": text} for number, text in enumerate(labels)]
    write_table(tmp_path / "raw" / "metadata.csv", rows)
    capsys.readouterr()
    work = pipeline.look(config_of(folder))
    assert work.placeholders == {"nan": 2, "-1": 1}
    assert "3 labels only stand for nothing and count as none: 'nan' (2), '-1' (1)" in capsys.readouterr().out
    rows = [{"image": f"{number}.jpg", "caption": text} for number, text in enumerate(["nan", "A red patch.", "N/A"])]
    write_table(tmp_path / "raw" / "metadata.csv", rows)
    table = RawTable.read(str(folder / "metadata.csv"), Layout(image=("image",), caption=("caption",)))
    assert table.samples(None).captions == [None, "A red patch.", None]
    raw = READERS["csv"](SourceRequest(str(folder)))
    assert [len(row) for row in raw.table["captions"].to_pylist()] == [0, 1, 0]


def test_evaluation_with_a_tree_finds_the_nodes_of_its_labels(tmp_path: Path) -> None:
    folder = clinic(tmp_path / "raw", {"BCC": 2, "basal-cell carcinomas": 1, "Mole": 2, "gibberish": 1}, TREE)
    names, times = scored(folder, ontology=Ontology.load(str(folder)))
    assert names == ["Basal cell carcinoma", "Melanocytic nevus"]
    assert (times[0], times[1], times[-2]) == (3, 2, 1)


def test_lists_in_cells_are_read_alike(tmp_path: Path) -> None:
    said = ["['Eczema', 'Psoriasis']", '["Psoriasis", "nan"]', "[]", "['unknown']", "Eczema"]
    meant = [["Eczema", "Psoriasis"], ["Psoriasis"], [], [], ["Eczema"]]
    # As NumPy writes arrays, and pandas and JSON what is not there.
    said += ["['Eczema' 'Psoriasis']", "['Eczema', nan]", '["Eczema", null]', "[nan]", "[1, 2]", "[1.5]"]
    meant += [["Eczema", "Psoriasis"], ["Eczema"], ["Eczema"], [], ["1", "2"], ["[1.5]"]]
    folder = clinic(tmp_path / "raw", dict.fromkeys(said, 1))
    assert READERS["csv"](SourceRequest(str(folder))).table["labels"].to_pylist() == meant
    assert RawTable.read(str(folder / "metadata.csv"), LAYOUT).samples(None).labels == meant


def test_captions_that_a_cell_lists_are_read_alike_and_what_a_table_says_in_vain_is_told(tmp_path: Path) -> None:
    said = ["['A  patch.', 'B']", '["nan", "C"]', "['unknown']", "[1] D", "  E  f ", "None"]
    first = ["A patch.", "C", None, "[1] D", "E f", None]
    labels = ["BCC", "BCC nodular", "bcc, mole", "MM", "Mole", "nan"]
    ages, sexes = ["45", "sixty", "40s", "sixty", "nan", "-1"], ["F", "W", "Lady", "m", "w", "n/a"]
    cells = zip(said, labels, ages, sexes, strict=True)
    rows = [
        {"image": f"{n}.jpg", "caption": text, "label": label, "age": age, "sex": sex, "body_site": "missing"}
        for n, (text, label, age, sex) in enumerate(cells)
    ]
    write_table(tmp_path / "metadata.csv", [*rows, {**rows[0], "image": ""}])
    write_images(tmp_path, "0.jpg")
    prepared = READERS["csv"](SourceRequest(str(tmp_path))).table["captions"].to_pylist()
    assert [each[0]["text"] if each else None for each in prepared[:6]] == first
    samples = RawTable.read(str(tmp_path / "metadata.csv"), LAYOUT).samples(None)
    assert samples.captions == first
    # What stands in the place of a body site and says nothing is none, as everywhere.
    assert samples.groups["body_site"] == [None] * 6
    assert samples.rows == {"in": 7, "used": 6, "told": {"no image path": 1}}
    assert list(telling.lines(samples.told)) == [
        "2 rows have no sex that is understood; it counts as unknown: 'W' (1), 'w' (1)",
        "3 rows have no age that is understood; it counts as unknown: 'sixty' (2), '40s' (1)",
        "2 labels name nothing that the table of names knows, and make classes of their own: "
        "'BCC nodular' (1), 'MM' (1)",
        "1 rows list several captions, of which the first counts",
    ]
    with_tree = RawTable.read(str(tmp_path / "metadata.csv"), LAYOUT).samples(None, ontology=Ontology.flat(["BCC"]))
    assert with_tree.told[telling.NO_NODES] == {"BCC nodular": 1, "MM": 1, "Mole": 1, "mole": 1}
    assert (
        telling.NO_NODES
        not in RawTable.read(str(tmp_path / "metadata.csv"), LAYOUT).samples(None, class_names=("BCC",)).told
    )


def test_a_fixed_class_list_takes_other_spellings_and_keeps_its_own_names(tmp_path: Path) -> None:
    folder = clinic(tmp_path / "raw", {"bcc": 2, "Naevi": 1, "MELANOMA": 2, "0": 1})
    names, times = scored(folder, class_names=("melanoma", "nevus", "basal cell carcinoma"))
    assert names == ["melanoma", "nevus", "basal cell carcinoma"]
    assert dict(times) == {0: 3, 1: 1, 2: 2}


def test_a_column_that_is_not_there_is_named_with_the_key_that_says_which(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    write_table(folder / "metadata.csv", [{"Photo": "1.jpg", "Diagnosis": "BCC"}])
    with pytest.raises(CorpusError, match=r"no column 'image'.* Photo, Diagnosis; .* columns\.image="):
        RawTable.read(str(folder / "metadata.csv"), LAYOUT)
    with pytest.raises(CorpusError, match=r"no column 'image'.* Photo, Diagnosis; .* columns\.image="):
        READERS["csv"](SourceRequest(str(folder)))
    with pytest.raises(CorpusError, match=r"no column 'dx'.* columns\.label="):
        READERS["csv"](SourceRequest(str(folder), columns=Columns(image="Photo", label="dx")))


def test_labels_that_name_no_node_are_told_with_what_they_may_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"Basal cel carcinoma": 12, "SK": 3, "hives": 2, "melanoma, excluded": 2, "wobble": 1}
    folder = clinic(tmp_path / "raw", said, TREE)
    pipeline.read(config_of(folder))
    assert (
        "18 of 20 rows have labels that name no node: Basal cel carcinoma (12; did you mean Basal cell carcinoma?), "
        "SK (3; could be Seborrheic keratosis or Solar keratosis), melanoma, excluded (2; it denies or asks), "
        "wobble (1); see rows 1, 2, 3, …; say what"
    ) in capsys.readouterr().out


def test_rows_that_nobody_sees_numbered_are_named_by_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folders"
    write_images(folder, "wobble/b.jpg", "wobble/a.jpg", "melanoma/c.jpg")
    pipeline.look(config_of(folder, "source=image_folder"))
    assert "wobble (2); see wobble/a.jpg, wobble/b.jpg; say" in capsys.readouterr().out
    folder = tmp_path / "tars"
    folder.mkdir()
    document = json.dumps({"label": "wobble", "source_id": "77"}).encode()
    write_samples(
        folder / "0.tar",
        {"a": {"jpg": b"x", "json": document}, "b": {"json": document}, "c": {"jpg": b"x", "json": b"{"}},
    )
    arguments = ["source=webdataset", f"input={folder}", f"output={folder}-out"]
    assert prepare_job.main(["--dry-run", *arguments]) == 0
    said = capsys.readouterr().out
    assert "wobble (2); see 0.tar!/a.jpg, 77; say" in said
    assert "malformed_row 1 (0.tar!/c), no_image_path 1 (77); nothing is written" in said
    with pytest.raises(CorpusError, match=r"malformed_row 1 \(0\.tar!/c\), no_image_path 1 \(77\), more than"):
        pipeline.read(parse(PrepareConfig, arguments))


def test_labels_that_are_placed_at_a_broader_node_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = '{"root": ["viral", "Bullous disease", "Melanoma"]}'
    folder = clinic(tmp_path / "raw", {"warts": 3, "Pemphigus": 1, "melanoma": 2}, tree)
    work = pipeline.read(config_of(folder))
    assert work.ontology.resolve("warts") == "viral"
    assert (
        "4 rows have labels without a node of their own, placed at a broader one: warts at viral (3), "
        "Pemphigus at Bullous disease (1); see rows 1, 2, 3, …"
    ) in capsys.readouterr().out


def test_a_tree_that_contradicts_the_table_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = '{"root": ["benign", "malignant"], "benign": ["MCC", "Lipoma"], "malignant": ["Hemangioma", "lump"]}'
    folder = clinic(tmp_path / "raw", {"Merkel cell carcinoma": 1}, tree)
    work = pipeline.look(config_of(folder))
    assert (
        "the disease tree contradicts the table of names at 2 nodes: MCC below benign, Hemangioma below malignant; what"
    ) in capsys.readouterr().out
    assert work.ontology.path("MCC") == ["malignant", "MCC"]


def test_rows_of_one_image_that_name_different_diseases_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"a": ["melanoma", "mole"], "b": ["BCC", "basal cell carcinoma"], "c": ["tumours", "Melanoma"]}
    labels |= {"d": ["melanoma", "melanoma, mole"], "e": ["melanoma", ""], "f": ["hives", "SK"], "g": ["hives", "BCC"]}
    rows = [{"image": f"{name}.jpg", "label": label} for name, both in labels.items() for label in both]
    folder = clinic(tmp_path / "raw", {"melanoma": 1}, TREE)
    write_table(folder / "metadata.csv", rows)
    pipeline.look(config_of(folder))
    assert (
        "2 images have rows that name different diseases, and get them all: a.jpg (Melanoma; Melanocytic nevus), "
        "g.jpg (Urticaria; Basal cell carcinoma)\n"
    ) in capsys.readouterr().out


def test_equal_files_whose_rows_name_different_diseases_are_told(tmp_path: Path) -> None:
    labels = ["melanoma", "mole", "hives", "BCC", "rodent ulcer", "tumours", "melanoma"]
    folder = clinic(tmp_path / "raw", {"melanoma": 1}, TREE)
    rows = [{"image": f"{number}.jpg", "label": label} for number, label in enumerate(labels)]
    write_table(folder / "metadata.csv", rows)
    write_images(folder, *(row["image"] for row in rows))
    for copy, of in ((1, 0), (4, 3), (6, 5)):
        shutil.copy(folder / f"{of}.jpg", folder / f"{copy}.jpg")
    config = config_of(folder, "split=val")
    work = pipeline.read(config)
    made = [ShardMaker(config, work.ontology).make(spec).record for spec in work.plan.shards]
    decided = reconcile([], made, policy="keep", near_groups=lambda hashes: hashes)
    final = [Amender(config.output, config.row_group_size, work.ontology).make(each) for each in decided.amendments]
    found = told.of_equal_images(decided, final)
    assert found.counts == {told.EQUAL_FILES: {"0.jpg and 1.jpg: Melanoma; Melanocytic nevus": 1}}
    assert found.lines == (
        "1 images lie in several files whose rows name different diseases, and get them all: "
        "'0.jpg and 1.jpg: Melanoma; Melanocytic nevus' (1)",
    )
    # Generations add what they have merged; of the rest the last has seen all.
    earlier = {told.EQUAL_FILES: {"a": 1}, "labels": {"x": 2}}
    assert told.summed([found.counts, {"labels": {"x": 3}}], [earlier, found.counts]) == {
        told.EQUAL_FILES: {"0.jpg and 1.jpg: Melanoma; Melanocytic nevus": 1, "a": 1},
        "labels": {"x": 3},
    }
    assert told.of_equal_images(decided, made).lines == ()


def test_a_dry_run_names_every_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path / "raw", {f"wobble {letter}": 1 for letter in "abcdefgh"})
    work = pipeline.look(config_of(folder))
    said = capsys.readouterr().out
    assert all(f"wobble {letter} (1)" in said for letter in "abcdefgh")
    assert work.told == {"labels that make classes of their own": {f"wobble {letter}": 1 for letter in "abcdefgh"}}
    pipeline.read(config_of(folder))
    assert "wobble e (1) and 3 more; see rows" in capsys.readouterr().out


def test_labelled_rows_that_are_dropped_for_want_of_a_caption_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clinic(tmp_path / "raw", {"hives": 1})
    said = [("hives", "A weal."), ("BCC", ""), ("Mole", "nan"), ("nan", "")]
    rows = [{"image": f"{n}.jpg", "label": label, "caption": text} for n, (label, text) in enumerate(said)]
    write_table(folder / "metadata.csv", rows)
    line = "2 rows have a label and no caption, and are dropped for want of one; columns.caption= makes the captions"
    work = pipeline.look(config_of(folder))
    assert line in capsys.readouterr().out
    assert work.told == {"rows dropped for want of a caption": {"with a label": 2}}
    assert [row.row for row in work.plan.dropped] == [2, 3, 4]
    work = pipeline.look(config_of(folder, "columns.caption="))
    assert "no caption" not in capsys.readouterr().out
    assert [row.row for row in work.plan.dropped] == [4]


def test_a_cell_of_several_diseases_takes_no_row_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"BCC, AK": 1, "BCC": 3, "Rodent ulcer": 2, "actinic keratosis": 2, "AK, itchy": 1, "left, lump": 1}
    folder = clinic(tmp_path / "raw", said)
    work = pipeline.read(config_of(folder))
    assert sorted(work.ontology) == ["Rodent ulcer", "actinic keratosis", "left, lump"]
    assert {text: work.ontology.resolve_all(text).labels for text in said} == {
        "BCC, AK": ("Rodent ulcer", "actinic keratosis"),
        "BCC": ("Rodent ulcer",),
        "Rodent ulcer": ("Rodent ulcer",),
        "actinic keratosis": ("actinic keratosis",),
        "AK, itchy": ("actinic keratosis",),
        "left, lump": ("left, lump",),
    }
    assert "1 of 10 rows have labels that name no node: itchy (1); see row 9; say" in capsys.readouterr().out
    names, times = scored(folder)
    assert names == ["Rodent ulcer", "actinic keratosis", "left"]
    assert dict(times) == {0: 6, 1: 3, 2: 1}
    shared = Ontology.folded({"AK, left arm": 1, "lump, left arm": 1, "hand eczema": 1})
    assert shared.resolve_all("lump, left arm") == (("left arm",), ("lump",))
    assert shared.resolve_all("AK, left arm") == (("Actinic keratosis", "left arm"), ())


def test_labels_without_a_tree_that_nothing_knows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path / "raw", {"?SCC": 2, "b.c.c.": 2, "BCC": 1, "Squamous Cell Ca.": 1, "SCC": 1, "SK": 1})
    work = pipeline.read(config_of(folder))
    assert work.ontology.resolve("BCC") == work.ontology.resolve("b.c.c.") == "Basal cell carcinoma"
    assert work.ontology.resolve("SCC") == work.ontology.resolve("Squamous Cell Ca.") != work.ontology.resolve("?SCC")
    assert (
        "3 labels name nothing that the table of names knows, and make classes of their own: ?SCC (2), "
        "SK (1; could be Seborrheic keratosis or Solar keratosis); see rows 1, 2, 8; say what they mean with "
        "columns.label_map=FILE"
    ) in capsys.readouterr().out


@pytest.mark.parametrize("tree", [None, TREE.replace('"Melanocytic nevus"', '"Melanocytic nevus, mole", "viral"')])
def test_captions_made_of_labels_name_the_diseases_that_they_mean(tmp_path: Path, tree: str | None) -> None:
    said = ["BCC", "basal-cell carcinoma", "Naevus", "melanocytic nevus", "BCC, MEL", "melanoma", "wobble", "wart"]
    folder = clinic(tmp_path / "raw", dict.fromkeys(said, 1), tree)
    raw = READERS["csv"](SourceRequest(str(folder)))
    named = [
        row[0]["text"].removeprefix("This is a skin photo diagnosed as ") for row in raw.table["captions"].to_pylist()
    ]
    bcc = "Basal cell carcinoma" if tree else "basal-cell carcinoma"
    nevus, melanoma = ("Melanocytic nevus", "Melanoma") if tree else ("Naevus", "melanoma")
    told = [bcc, bcc, nevus, nevus, f"{bcc}, {melanoma}", melanoma, "wobble", "wart"]
    assert named == [f"{name}." for name in told]


def test_a_map_of_ones_own_says_what_labels_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path / "raw", {"sk": 3, "Wobble": 2, "BCC": 1}, TREE)
    (folder / "map.csv").write_text("\ufefflabel;means\nSK;seborrheic keratosis\nwobble;\n", encoding="utf-8")
    config = config_of(folder, "columns.label_map=map.csv", "max_dropped_fraction=1")
    work = pipeline.read(config)
    assert "name no node" not in capsys.readouterr().out
    assert any(table.uri.endswith("map.csv") for table in work.tables)
    raw = READERS["csv"](SourceRequest(str(folder), columns=config.columns))
    assert Counter(map(tuple, raw.table["labels"].to_pylist())) == {("seborrheic keratosis",): 3, (): 2, ("BCC",): 1}
    # The key is no part of a corpus that was made without it.
    assert "label_map" not in config_of(folder).content()["columns"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file, neither as it stands nor under input"),
        (b"text,node\na,b\n", "must have the columns label and means"),
        (b"label,means\n", "has no rows below its header"),
        (b"label,means\n,b\n", "row 1: no label"),
        (b"label,means\nSK,a\nsk,b\n", "row 2: 'sk' means 'b' here and 'a' above"),
        (b"label,means\nna\xefve,b\n", "line 2 holds the byte 0xEF .*save it again as UTF-8"),
        (b"label,means\nSK,a\nSCC, invasive,b\n", "row 2: 3 cells where the header has 2.*in quotation marks"),
    ],
)
def test_a_map_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = clinic(tmp_path / "raw", {"SK": 1})
    if content is not None:
        (folder / "map.csv").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        READERS["csv"](SourceRequest(str(folder), columns=Columns(label_map="map.csv")))


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ("Haemangioma", "vascular"),
        ("hemangiomas", "vascular"),
        ("HAEMANGIOMA.", "vascular"),
        ("Seb-K", "SK"),
        ("seb k", "SK"),
        # Two rows that are alike but for the plural are two, and a third spelling means neither.
        ("wart", "one"),
        ("warts", "many"),
        ("w\u00e1rt", "w\u00e1rt"),
        ("seb k, hemangiomas, eczema", "SK, vascular, eczema"),
        ("Seb K; NOS", "Seb K; NOS"),
        ("Seb K, NOS", "SK"),
        ("NOS", None),
    ],
)
def test_a_map_folds_labels_as_everything_does(tmp_path: Path, label: str, meant: str | None) -> None:
    folder = clinic(tmp_path / "raw", {label: 1})
    text = "label,means\nHaemangioma,vascular\nSeb K,SK\nwart,one\nwarts,many\nNOS,\n"
    (folder / "map.csv").write_text(text, encoding="utf-8")
    raw = READERS["csv"](SourceRequest(str(folder), columns=Columns(label_map="map.csv")))
    assert raw.table["labels"].to_pylist() == [[] if meant is None else [meant]]


def test_rows_of_a_map_that_match_no_label_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path / "raw", {"sk": 3, "Naevi": 1})
    rows = ["SK,seborrheic keratosis", "Wobbel,eczema", "nevus,mole", *(f"x{number},y" for number in range(6))]
    (folder / "map.csv").write_text("\n".join(["label,means", *rows, ""]), encoding="utf-8")
    pipeline.look(config_of(folder, "columns.label_map=map.csv"))
    told = "7 rows of columns.label_map match no label of the table: 'Wobbel', 'x0', 'x1', 'x2', 'x3' and 2 more"
    assert told in capsys.readouterr().out


def test_a_map_is_read_as_every_table_is(tmp_path: Path) -> None:
    folder = clinic(tmp_path / "raw", {"sk": 1, "wobble": 1, "na\u00efve": 1})
    text = "sep=;\n label ;means\nSK;seborrheic keratosis\nwobble;N/A\nna\u00efve;Nevus\n"
    (folder / "map.csv").write_text(text, encoding="utf-16")
    raw = READERS["csv"](SourceRequest(str(folder), columns=Columns(label_map="map.csv")))
    assert raw.table["labels"].to_pylist() == [["seborrheic keratosis"], [], ["Nevus"]]


def test_a_tars_label_and_labels_are_both_read(tmp_path: Path) -> None:
    documents = [{"labels": ["Nevus"], "label": "Melanoma"}, {"labels": None, "label": "BCC"}, {"labels": ["AK"]}]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, document in enumerate(documents):
            for name, data in ((f"{number}.jpg", b"image"), (f"{number}.json", json.dumps(document).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    raw = READERS["webdataset"](SourceRequest(str(tmp_path)))
    assert raw.table["labels"].to_pylist() == [["Nevus", "Melanoma"], ["BCC"], ["AK"]]


def test_a_map_for_a_source_that_reads_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="columns.label_map is read for source=csv and parquet, not for derm1m"):
        parse(PrepareConfig, ["source=derm1m", f"input={tmp_path}", f"output={tmp_path}-o", "columns.label_map=x.csv"])


def test_a_dry_run_says_what_would_come_of_a_table_and_writes_nothing(tmp_path: Path) -> None:
    folder = clinic(tmp_path / "raw", {"Wobbly thing": 2, "BCC": 1, "melanoma": 1}, TREE)
    write_table(folder / "metadata.csv", [{"image": "", "label": "BCC"}, {"image": "0.jpg", "label": "wobbly thing"}])
    command = [
        sys.executable,
        "jobs/prepare.py",
        "--dry-run",
        "source=csv",
        f"input={folder}",
        f"output={tmp_path}/out",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 2 rows have labels that name no node: wobbly thing (1)" in done.stdout
    dropped = "rows dropped before that: no_image_path 1 (row 1); nothing is written"
    assert f"dry run: 1 images to look at, {dropped}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
