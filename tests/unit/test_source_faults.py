"""What published sources hold that gives nothing to any sample is told: misspelt, missing, doubled, odd."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.errors import CorpusError
from dermray.prepare.plan import plan_shards, usable_rows
from dermray.raw import sources
from dermray.raw.sources import RawRows, SourceRequest, derm1m
from dermray.raw.sources.rows import Columns
from dermray.raw.sources.skincon import REJECTED
from dermray.raw.sources.telling import told_of
from tests.raw_corpus import photograph
from tests.raw_sources import DERM1M_IMAGES, FITZPATRICK, LAYOUTS, NAMES, Row, write_samples, write_table

CONCEPTS = "concept.csv"
TABLES = [source for source in sorted(LAYOUTS) if LAYOUTS[source].table]


def read(source: str, folder: Path) -> tuple[list[Mapping[str, object]], RawRows, str]:
    """Rows, what the reader returns, and what the terminal says."""
    request = SourceRequest(str(folder))
    raw = sources.read(source, request)
    return raw.table.to_pylist(), raw, "\n".join(told_of(raw, request.findings))


def change(file: Path, edit: Callable[[list[dict[str, str]]], object]) -> None:
    """Read a table, change its rows in place, write it again."""
    with file.open(encoding="utf-8", newline="") as content:
        table = list(csv.DictReader(content))
    edit(table)
    write_table(file, table)


def put(table: str, row: int, **cells: str) -> Callable[[Path], None]:
    return lambda folder: change(folder / table, lambda rows: rows[row].update(cells))


def append(table: str, line: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with (folder / table).open("a", encoding="utf-8") as sink:
            sink.write(line)

    return write


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, rows: list[Row]) -> Callable[[Path], None]:
    return lambda folder: write_table(folder / name, rows)


FLAGS = [{"filename": DERM1M_IMAGES[3], "Papule": "1", "Scale": mark} for mark in ("1", "0", "perhaps")]
DIAGNOSES = [{"md5hash": name, **FITZPATRICK} for name in (NAMES[0], NAMES[0])]
FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "concepts, misspelt file": (
        "derm1m",
        rewrite(CONCEPTS, [{"filename": "public/zz.jpg", "Papule": "1"}]),
        "rows of concept.csv for files that no row has (1)",
    ),
    "concepts, doubled file": (
        "derm1m",
        rewrite(CONCEPTS, [FLAGS[0], FLAGS[1]]),
        "rows of concept.csv for a file that one above names (1)",
    ),
    "concepts, odd mark": (
        "derm1m",
        rewrite(CONCEPTS, [{**flag, "filename": f"{n}.jpg"} for n, flag in enumerate(FLAGS)]),
        "concept.csv, column scale: cells such as 'perhaps' that say neither yes nor no (1)",
    ),
    "concepts, a cell too many": ("derm1m", append(CONCEPTS, "a,b,c,d,e\n"), "malformed rows of concept.csv (1)"),
    "concepts, a column of texts": (
        "derm1m",
        rewrite(CONCEPTS, [{"filename": DERM1M_IMAGES[3], "Papule": "1", "Scale": "scaly"}]),
        "concept.csv, column Scale, which holds no marks (1)",
    ),
    "misspelt concept": (
        "skincon",
        lambda folder: change(
            folder / "annotations_fitzpatrick17k.csv", lambda rows: [row.update(Papul="1") for row in rows]
        ),
        "columns that nothing names are only kept, in meta.extra: 'Papul'",
    ),
    "indexes, one is missing": (
        "derm7pt",
        unlink("meta/valid_indexes.csv"),
        "meta/train_indexes.csv without the other two (1)",
    ),
    "indexes, beyond the table": (
        "derm7pt",
        append("meta/test_indexes.csv", "77\n"),
        "numbers in meta/test_indexes.csv that no row has (1)",
    ),
    "marks": (
        "skincon",
        put("annotations_fitzpatrick17k.csv", 0, Papule="2"),
        "column Papule: cells such as '2' that say neither yes nor no (1)",
    ),
    "marks of rejection": (
        "skincap",
        put("skincap_v240623.csv", 0, **{REJECTED: "perhaps"}),
        f"column {REJECTED}: cells such as 'perhaps' that say neither yes nor no (1)",
    ),
    "diagnoses of other images": (
        "skincon",
        rewrite("fitzpatrick17k.csv", [{"md5hash": "zz", **FITZPATRICK}]),
        "fitzpatrick17k.csv, which names none of the images (1)",
    ),
    "diagnoses of some images": (
        "skincon",
        rewrite("fitzpatrick17k.csv", DIAGNOSES[:1]),
        "images that fitzpatrick17k.csv says nothing of (2)",
    ),
    "diagnoses, doubled": (
        "skincon",
        rewrite("fitzpatrick17k.csv", DIAGNOSES),
        "rows of fitzpatrick17k.csv for an image that one above names (1)",
    ),
    "answers": (
        "pad_ufes_20",
        put("metadata.csv", 0, itch="sometimes"),
        "column itch: cells such as 'sometimes' that say neither yes nor no (1)",
    ),
    "misspelt column": (
        "csv",
        lambda folder: change(folder / "metadata.csv", lambda rows: [row.update(lables="AK") for row in rows]),
        "columns that nothing names are only kept, in meta.extra: 'lables'",
    ),
    "compressed archive": (
        "webdataset",
        lambda folder: (folder / "2.tar.gz").write_bytes(b"x"),
        "compressed .tar archives, which must be gunzipped first (1)",
    ),
    "a folder beside those of splits": (
        "image_folder",
        lambda folder: shutil.copytree(folder / "psoriasis", folder / "train" / "psoriasis", dirs_exist_ok=True),
        "images of 'eczema', a class beside folders of splits (1)",
    ),
    "keys that stand twice in a tar's .json": (
        "webdataset",
        lambda folder: write_samples(
            folder / "shard-1.tar",
            {
                "c": {
                    "png": photograph(2, 48, 40),
                    "json": b'{"label": "acne", "label": "AK", "meta": {"x": 1, "x": 2}}',
                }
            },
        ),
        "keys stand twice in one object of JSON, and the last one counts: 'label' (1), 'x' (1)",
    ),
    "litter among archives": (
        "webdataset",
        lambda folder: shutil.copy(folder / "shard-1.tar", folder / "._shard-1.tar"),
        "passed over 1 files that systems and programs leave behind: ._* (1)",
    ),
    "litter among Parquet files": (
        "parquet",
        lambda folder: (folder / "._a.parquet").write_bytes(b"x"),
        "passed over 1 files that systems and programs leave behind: ._* (1)",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_gives_nothing_to_any_sample_is_told(fault: str, tmp_path: Path) -> None:
    source, damage, line = FAULTS[fault]
    LAYOUTS[source].write(tmp_path)
    _, before, quiet = read(source, tmp_path)
    assert line not in quiet
    damage(tmp_path)
    _, raw, told = read(source, tmp_path)
    assert line in told
    assert raw.num_rows == before.num_rows + (source == "image_folder")


@pytest.mark.parametrize(
    ("index", "detail"), [("", "none of the indexes lists it"), ("0\n1", "the indexes of train and of val list it")]
)
def test_derm7pt_drops_cases_of_no_split_or_of_two(tmp_path: Path, index: str, detail: str) -> None:
    LAYOUTS["derm7pt"].write(tmp_path)
    lists = {"train": index or "77", "valid": "1", "test": "2"}
    for name, rows in lists.items():
        (tmp_path / "meta" / f"{name}_indexes.csv").write_text(f"indexes\n{rows}\n", encoding="utf-8")
    rows, raw, _ = read("derm7pt", tmp_path)
    (dropped,) = raw.dropped
    assert (dropped.reason, detail in dropped.detail) == ("split_unclear", True)
    assert len(rows) == 4
    assert dropped.row not in {row["row"] for row in rows}


@pytest.mark.parametrize("index", ["1.5", "-1", "nan", ""])
def test_derm7pt_refuses_indexes_that_are_no_rows(tmp_path: Path, index: str) -> None:
    LAYOUTS["derm7pt"].write(tmp_path)
    write_table(tmp_path / "meta" / "test_indexes.csv", [{"indexes": index, "x": ""}])
    with pytest.raises(CorpusError, match="is no number of a row, from 0"):
        read("derm7pt", tmp_path)


def test_other_words_for_yes_are_marks(tmp_path: Path) -> None:
    LAYOUTS["skincon"].write(tmp_path)
    put("annotations_fitzpatrick17k.csv", 0, Papule=" Yes ", **{REJECTED: "no"})(tmp_path)
    put("annotations_fitzpatrick17k.csv", 1, **{REJECTED: "YES"})(tmp_path)
    rows, raw, told = read("skincon", tmp_path)
    assert "papule" in rows[0]["concepts"]  # type: ignore[operator]
    assert [row.row for row in raw.dropped] == [2, 4]
    assert "neither" not in told


@pytest.mark.parametrize(
    "name", ["youtube\\a_frame_1_0.jpg", "./youtube/a_frame_9_0.jpg", "images/youtube/a_frame_3_0.jpg"]
)
def test_groups_are_told_however_a_path_is_spelled(name: str) -> None:
    assert derm1m.group_of(name) == "youtube/a"


def test_concepts_are_found_however_a_path_is_spelled(tmp_path: Path) -> None:
    LAYOUTS["derm1m"].write(tmp_path)
    put("Derm1M_v2_validation.csv", 0, skin_concept="")(tmp_path)
    write_table(
        tmp_path / CONCEPTS, [{"filename": DERM1M_IMAGES[3].replace("/", "\\"), "Papule": "True", "Scale": "no"}]
    )
    rows, _, told = read("derm1m", tmp_path)
    assert (rows[3]["concepts"], "not used" in told) == (["papule"], False)


@pytest.mark.parametrize("mask", ["[1, 1, [1]]", "[1, 1, {}]", "[1, 1, None]", "(1, 1, 0.5)"])
def test_masks_of_odd_values_name_the_row(tmp_path: Path, mask: str) -> None:
    LAYOUTS["make_table"].write(tmp_path)
    put("MAKE_train.csv", 1, knowledge_masks=mask)(tmp_path)
    with pytest.raises(CorpusError, match=r"row 2, column 'knowledge_masks'.* is no list of 3 0 and 1"):
        read("make_table", tmp_path)


@pytest.mark.parametrize("form", ["sequence", "list"])
def test_lists_of_classes_have_their_names_and_second_images_are_told(tmp_path: Path, form: str) -> None:
    item = {"names": ["psoriasis", "eczema"], "_type": "ClassLabel"}
    feature = {"feature": item, "_type": "Sequence"} if form == "sequence" else [item]
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    schema = pa.schema({"image": pa.binary(), "mask": pa.binary(), "label": pa.list_(pa.int64())}, metadata=metadata)
    rows = [{"image": photograph(n, 48, 40), "mask": b"m", "label": label} for n, label in enumerate(([0, 1], [], [1]))]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    found, _, told = read("parquet", tmp_path)
    assert [row["labels"] for row in found] == [["psoriasis, eczema"], [], ["eczema"]]
    assert "images of the column 'mask'; columns.image= says which are read (3)" in told


def test_captions_that_a_cell_lists_are_captions(tmp_path: Path) -> None:
    said = {
        "['A patch.', 'B  b']": ["A patch.", "B b"],
        '["A"]': ["A"],
        "[1] A figure": ["[1] A figure"],
        "C": ["C"],
        "": [],
    }
    write_table(tmp_path / "metadata.csv", [{"image": f"{n}.jpg", "caption": cell} for n, cell in enumerate(said)])
    rows, _, _ = read("csv", tmp_path)
    assert [[each["text"] for each in row["captions"]] for row in rows] == list(said.values())  # type: ignore[attr-defined]


def test_tars_tell_the_split_of_samples_that_name_none(tmp_path: Path) -> None:
    for folder in ("train", "Validation"):
        (tmp_path / folder).mkdir()
        files = {"jpg": b"x", "txt": b"A patch."}
        write_samples(tmp_path / folder / "0.tar", {"a": files, "b": {**files, "json": b'{"split": "mine"}'}})
    rows, _, _ = read("webdataset", tmp_path)
    assert [row["split"] for row in rows] == ["val", "mine", "train", "mine"]
    # Of what is all for training, other splits may be drawn.
    shutil.rmtree(tmp_path / "Validation")
    assert [row["split"] for row in read("webdataset", tmp_path)[0]] == [None, "mine"]


# Columns of which a cell may say what no sample holds, as each reader's page says.
NOT_TAKEN = {
    "derm1m": {"caption"},
    "derm1m_agentaug": {f"subcaption_{number}" for number in range(3, 9)},
    "fitzpatrick17k": {"url_alphanum"},
    "make_table": {"caption", "sub_captions", *(f"subcaption_{number}" for number in range(3, 9))},
    "skincon": {""},
}


@pytest.mark.parametrize("source", TABLES)
def test_a_cell_of_any_text_is_in_a_sample_or_told(source: str, tmp_path: Path) -> None:
    LAYOUTS[source].write(tmp_path)
    file = tmp_path / str(LAYOUTS[source].table)
    before = file.read_bytes()
    with file.open(encoding="utf-8", newline="") as content:
        columns = next(csv.reader(content))
    lost = []
    for column in columns:
        put(file.name if file.parent == tmp_path else f"meta/{file.name}", 0, **{column: "zq17"})(tmp_path)
        try:
            rows, raw, told = read(source, tmp_path)
            said = f"{rows}{raw.dropped}{told}"
        except CorpusError as error:
            said = str(error)
        if "zq17" not in said:
            lost.append(column)
        file.write_bytes(before)
    assert set(lost) == NOT_TAKEN.get(source, set())


def test_a_map_that_an_exported_corpus_does_not_take_is_told(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.csv", [{"image": "a.jpg", "dermray_sample": "{}"}])
    request = SourceRequest(str(tmp_path), columns=Columns(label_map="map.csv"))
    raw = sources.read("csv", request)
    assert "columns.label_map, since the samples are an exported corpus's (1)" in "\n".join(
        told_of(raw, request.findings)
    )


def test_keys_that_stand_twice_in_a_sample_of_an_exported_table_are_told(tmp_path: Path) -> None:
    said = {"source": "x", "source_id": "1", "captions": [], "labels": ["a"], "concepts": [], "split": "val"}
    doubled = json.dumps({"dermray": 1, **said}).replace("{", '{"labels": ["b"], "split": "train", ', 1)
    write_table(tmp_path / "metadata.csv", [{"image": f"{n}.jpg", "dermray_sample": doubled} for n in range(2)])
    rows, raw, told = read("csv", tmp_path)
    assert ([row["labels"] for row in rows], raw.dropped) == ([["a"], ["a"]], ())
    assert "keys stand twice in one object of JSON, and the last one counts: 'labels' (2), 'split' (2)" in told


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8-sig", ";"), ("utf-16", "\t")])
@pytest.mark.parametrize("source", TABLES)
def test_tables_as_spreadsheets_save_them_give_the_same_rows(
    source: str, encoding: str, separator: str, tmp_path: Path
) -> None:
    LAYOUTS[source].write(tmp_path)
    before, _, told = read(source, tmp_path)
    for file in tmp_path.rglob("*.csv"):
        with file.open(encoding="utf-8", newline="") as content:
            rows = list(csv.reader(content))
        with file.open("w", encoding=encoding, newline="") as sink:
            csv.writer(sink, delimiter=separator).writerows([[f" {name} " for name in rows[0]], *rows[1:]])
    after, raw, told_again = read(source, tmp_path)
    assert (after, told_again) == (before, told)
    assert not [row for row in raw.dropped if row.reason == "malformed_row"]


@pytest.mark.parametrize("source", TABLES)
def test_a_row_that_stands_twice_is_two_rows_of_one_image(source: str, tmp_path: Path) -> None:
    LAYOUTS[source].write(tmp_path)
    _, before, _ = read(source, tmp_path)
    change(tmp_path / str(LAYOUTS[source].table), lambda rows: rows.append(dict(rows[0])))
    if source == "derm7pt":
        append("meta/test_indexes.csv", "3\n")(tmp_path)
    _, raw, _ = read(source, tmp_path)
    # A row of derm7pt has two images.
    doubled = 2 if source == "derm7pt" else 1
    assert raw.num_rows == before.num_rows + doubled
    assert raw.table["image"].to_pylist().count(before.table["image"][0].as_py()) == 2
    plans = [plan_shards(usable_rows(each), split="test", seed=0, rows_per_shard=100) for each in (before, raw)]
    assert plans[0].num_images == plans[1].num_images > 0
