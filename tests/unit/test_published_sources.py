"""What each published layout means: splits, concepts, masks, trees, captions. What all share is in the contract."""

from __future__ import annotations

import json
import re
import zipfile
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.errors import CorpusError
from dermray.prepare.pipeline import read as read_work
from dermray.prepare.settings import PrepareConfig
from dermray.raw import archives
from dermray.raw.fetch import ImageStore
from dermray.raw.sources import READERS, RawRows, SourceRequest, derm1m
from tests.raw_corpus import photograph
from tests.raw_sources import (
    AGENTAUG_IMAGES,
    DERM1M,
    DERM1M_BLANK,
    FITZPATRICK,
    LAYOUTS,
    MAKE_ROW,
    agentaug_layout,
    agentaug_parquet,
    rows,
    write_images,
    write_samples,
    write_table,
    write_tree,
)

RAW_ONTOLOGY_CONCEPT = ["raw", "ontology", "concept"]


def read(source: str, folder: Path, **request: Any) -> RawRows:
    return READERS[source](SourceRequest(str(folder), **request))


def written(source: str, folder: Path) -> dict[str, dict[str, Any]]:
    LAYOUTS[source].write(folder)
    return {row["source_id"]: row for row in read(source, folder).table.to_pylist()}


def captions(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(caption["aspect"], caption["text"]) for caption in row["captions"]]


def test_derm1m_tables_prescribe_the_splits(tmp_path: Path) -> None:
    found = list(written("derm1m", tmp_path).values())
    assert [(row["row"], row["split"]) for row in found] == [(1, "train"), (2, "train"), (3, "train"), (4, "val")]
    alone = read("derm1m", tmp_path, table="Derm1M_v2_validation.csv").table.to_pylist()
    assert [(row["row"], row["split"]) for row in alone] == [(1, None)]
    (tmp_path / "Derm1M_v2_validation.csv").unlink()
    assert set(read("derm1m", tmp_path).table["split"].to_pylist()) == {None}


def test_derm1m_malformed_rows_are_numbered_over_both_tables(tmp_path: Path) -> None:
    LAYOUTS["derm1m"].write(tmp_path)
    for name in ("Derm1M_v2_pretrain.csv", "Derm1M_v2_validation.csv"):
        with (tmp_path / name).open("a", encoding="utf-8") as table:
            table.write("too,few\n")
    raw = read("derm1m", tmp_path)
    assert raw.table["row"].to_pylist() == [1, 2, 3, 5]
    assert [row.row for row in raw.dropped] == [4, 6]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([{"filename": "a.jpg", "skin_concept": "Papule, Scale"}], ["papule", "scale"]),
        ([{"filename": "a.jpg", "disease_label": "x", "Papule": "1.0", "Scale": "0"}], ["papule"]),
        ([{"filename": "b.jpg", "concepts": "papule"}], []),
    ],
)
def test_derm1m_concepts_fill_what_is_empty(tmp_path: Path, table: list[dict[str, str]], expected: list[str]) -> None:
    blank = {**DERM1M, **DERM1M_BLANK}
    write_table(
        tmp_path / "Derm1M_v2_pretrain.csv", rows({"filename": "a.jpg", **blank}, {"filename": "b.jpg", **DERM1M})
    )
    write_table(tmp_path / "concept.csv", table)
    write_tree(tmp_path)
    first, second = read("derm1m", tmp_path).table.to_pylist()
    assert first["concepts"] == expected
    assert second["concepts"] == ["red", "patch"]


def test_derm1m_concepts_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    LAYOUTS["derm1m"].write(tmp_path)
    write_table(tmp_path / "concept.csv", [{"filename": "a.jpg", "note": "papule"}])
    with pytest.raises(CorpusError, match=r"concept\.csv has no column 'skin_concept'.*filename, note"):
        read("derm1m", tmp_path)


def test_derm1m_images_in_archives_and_folders_that_no_row_names(tmp_path: Path) -> None:
    write_images(tmp_path, "edu/a.jpg", "validation_data/b.jpg")
    with zipfile.ZipFile(tmp_path / "part 2.zip", "w") as archive:
        archive.writestr("Derm1M/public/c d.jpg", photograph(1))
        archive.writestr("__MACOSX/public/._c d.jpg", b"x")
    names = ("edu/a.jpg", "b.jpg", "public/c d.jpg", "public/nowhere.jpg", "edu/nowhere.jpg")
    write_table(tmp_path / "Derm1M_v2_pretrain.csv", rows(*({"filename": name} for name in names), **DERM1M))
    write_tree(tmp_path)
    raw = read("derm1m", tmp_path)
    assert raw.table["image"].to_pylist() == [
        "edu/a.jpg",
        "validation_data/b.jpg",
        "part 2.zip!/Derm1M/public/c d.jpg",
        "public/nowhere.jpg",
        "edu/nowhere.jpg",
    ]
    assert raw.table["source_id"].to_pylist() == list(names)


def test_make_takes_the_published_captions_by_their_masks(tmp_path: Path) -> None:
    found = written("make_table", tmp_path)
    first = found["textbook/皮肤 图_00384_19121.png"]
    assert captions(first) == [
        ("raw", "Red patch. It itches."),
        ("ontology", "This is a skin photo diagnosed as inflammatory, psoriasis."),
        ("concept", "This skin photo shows red, patch."),
        ("sub", "Red patch"),
        ("sub", "It itches"),
    ]
    assert (first["image"], first["group"]) == (first["source_id"], "textbook/皮肤 图_00384")
    assert [aspect for aspect, _ in captions(found["public/c.jpg"])] == ["raw", "sub", "sub"]


@pytest.mark.parametrize(
    ("masks", "aspects"),
    [
        ({"knowledge_masks": "[1, 0, 1]"}, ["raw", "concept", "sub", "sub"]),
        ({"knowledge_masks": "[1, 1, 0]"}, ["raw", "ontology", "sub", "sub"]),
        ({"knowledge_masks": "[0, 0, 0]", "sub_caption_mask": "[0, 1, 1, 0, 0, 0, 0, 0]"}, ["sub"]),
        ({"knowledge_masks": "", "sub_caption_mask": "(1.0, 0, 0, 0, 0, 0, 0, 0)"}, [*RAW_ONTOLOGY_CONCEPT, "sub"]),
    ],
)
def test_make_masks_are_caption_ontology_visual(tmp_path: Path, masks: dict[str, str], aspects: list[str]) -> None:
    write_table(tmp_path / "MAKE_train.csv", [{"filename": "a.png", **MAKE_ROW, **masks}])
    (row,) = read("make_table", tmp_path).table.to_pylist()
    assert [aspect for aspect, _ in captions(row)] == aspects


def test_make_tables_beside_the_training_table_are_splits(tmp_path: Path) -> None:
    for name, ids in (("train", "ab"), ("valid", "c"), ("test", "de")):
        write_table(tmp_path / f"MAKE_{name}.csv", rows(*({"filename": f"{each}.png"} for each in ids), **MAKE_ROW))
    raw = read("make_table", tmp_path)
    assert raw.table["row"].to_pylist() == [1, 2, 3, 4, 5]
    assert raw.table["split"].to_pylist() == ["train", "train", "val", "test", "test"]
    assert read("make_table", tmp_path, table="MAKE_test.csv").table["split"].to_pylist() == [None, None]
    (tmp_path / "MAKE_train.csv").unlink()
    assert read("make_table", tmp_path, limit=1).table["split"].to_pylist() == ["val", "test"]


def test_agentaug_has_the_diagnosis_and_concepts_of_its_sentences(tmp_path: Path) -> None:
    found = written("derm1m_agentaug", tmp_path)
    first, second, third = (found[name] for name in AGENTAUG_IMAGES)
    assert captions(first)[:2] == [
        ("raw", "Red patch. It itches."),
        ("ontology", "This is a skin photo diagnosed as inflammatory, psoriasis."),
    ]
    assert (first["labels"], first["hierarchy"]) == (["psoriasis"], "inflammatory, psoriasis")
    assert (first["concepts"], first["source"]) == (["red", "patch"], "derm1m_agentaug")
    said = {"source": "textbook_english", "source_type": "knowledge", "ontology_label": "17"}
    assert json.loads(first["meta"]["extra"]) == {**said, "agent_generated": "True"}
    assert json.loads(second["meta"]["extra"])["agent_generated"] == "False"
    assert ([aspect for aspect, _ in captions(third)], third["labels"]) == (["sub", "sub"], [])
    assert "ontology_label" not in json.loads(third["meta"]["extra"])
    # The names of two of them are one; their places are not.
    assert (first["image"], third["image"]) == (f"images/{first['source_id']}", f"images/{third['source_id']}")
    # With the tree, a row's label is the node that its path names.
    write_tree(tmp_path)
    raw = read("derm1m_agentaug", tmp_path)
    assert raw.table["labels"].to_pylist()[0] == ["inflammatory, psoriasis"]
    assert raw.ontology is not None
    assert raw.ontology.resolve_all("inflammatory, psoriasis").labels == ("psoriasis",)


def test_captions_of_agentaug_that_are_the_text_nan_are_none_and_told(tmp_path: Path) -> None:
    agentaug_layout(tmp_path)
    request = SourceRequest(str(tmp_path))
    READERS["derm1m_agentaug"](request)
    assert request.findings.unused["cells of truncated_caption that only stand for nothing, such as nan"] == 1


@pytest.mark.parametrize("limit", [None, 2])
def test_agentaug_is_the_same_in_the_files_of_its_release(limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    agentaug_layout(tmp_path / "table")
    agentaug_parquet(tmp_path, 1, 2)
    request = SourceRequest(str(tmp_path), limit=limit)
    raw = READERS["derm1m_agentaug"](request)
    table = read("derm1m_agentaug", tmp_path / "table", limit=limit).table
    assert raw.table.drop_columns("image").equals(table.drop_columns("image"))
    assert sum(request.rows_met.values()) == raw.num_rows
    images = {
        str(folder): [
            ImageStore(str(folder), max_bytes=1 << 20, follow_links=False).fetch(name).data
            for name in each["image"].to_pylist()
        ]
        for folder, each in ((tmp_path, raw.table), (tmp_path / "table", table))
    }
    there, here = images.values()
    assert there == here
    assert None not in there
    alone = read("derm1m_agentaug", tmp_path, table="data/train-00001.parquet").table
    assert alone["source_id"].to_pylist() == list(AGENTAUG_IMAGES[1:])


def agentaug_file(folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """A file of the release, otherwise written."""
    agentaug_parquet(folder, 3)
    file = folder / "data" / "train-00000.parquet"
    table = pq.read_table(file)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)
    return file


def test_agentaug_takes_only_the_columns_it_knows_and_masks_as_lists(tmp_path: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        for name in ("knowledge_masks", "sub_caption_mask"):
            masks = pa.array([literal_eval(cell) for cell in table[name].to_pylist()], pa.list_(pa.int8()))
            table = table.set_column(table.column_names.index(name), name, masks)
        table = table.rename_columns([f" {name}" if name == "source" else name for name in table.column_names])
        return table.append_column("more", pa.array([{"a": 1}] * 3))

    (tmp_path / "other").mkdir()
    agentaug_parquet(tmp_path / "other", 3)
    plain = read("derm1m_agentaug", tmp_path / "other").table
    folder = tmp_path / "this"
    folder.mkdir()
    agentaug_file(folder, change)
    found = read("derm1m_agentaug", folder).table
    assert found.drop_columns("image").equals(plain.drop_columns("image"))


def test_agentaug_names_file_and_column_of_what_is_no_text(tmp_path: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index("subcaption_1")
        return table.set_column(place, "subcaption_1", pa.array([{"a": 1}] * 3))

    agentaug_file(tmp_path, change)
    with pytest.raises(CorpusError, match=r"train-00000\.parquet: column 'subcaption_1' is of struct<a: int64>; write"):
        read("derm1m_agentaug", tmp_path)


def test_agentaug_counts_sentences_of_another_form(tmp_path: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        two = "This is a skin photo diagnosed as inflammatory, psoriasis; neoplasm, naevus."
        other = pa.array(["The diagnosis is psoriasis.", None, two])
        return table.set_column(table.column_names.index("ontology_caption"), "ontology_caption", other)

    agentaug_file(tmp_path, change)
    request = SourceRequest(str(tmp_path))
    raw = READERS["derm1m_agentaug"](request)
    assert raw.table["labels"].to_pylist()[:2] == [[], []]
    told = "cells of ontology_caption in another form than the published sentence; they give no label"
    assert request.findings.unused[told] == 1
    several = "cells of ontology_caption that may name several paths, which are read as one"
    assert request.findings.unused[several] == 1


@pytest.mark.parametrize("mask", ["[1, 1]", "[1, 1, 2]", "1", "__import__('os')", "[1, 1, ["])
def test_make_masks_that_are_none_name_the_row(tmp_path: Path, mask: str) -> None:
    table = rows({"filename": "a.png"}, {"filename": "b.png", "knowledge_masks": mask}, **MAKE_ROW)
    write_table(tmp_path / "MAKE_train.csv", table)
    with pytest.raises(CorpusError, match=r"row 2, column 'knowledge_masks': .* is no list of 3 0 and 1"):
        read("make_table", tmp_path)


def test_isic_levels_become_the_tree(tmp_path: Path) -> None:
    found = written("isic", tmp_path)
    first, second = found["皮肤 图_1"], found["b"]
    assert first["hierarchy"] == "Benign, Benign melanocytic proliferations, Nevus, Nevus NOS Compound"
    assert (first["labels"], second["labels"]) == (["Nevus NOS Compound"], ["Nevus"])
    assert (first["skin_type"], first["meta"]["body_site"], first["meta"]["lesion_id"]) == (2, "head/neck", "IL_1")
    tree = read("isic", tmp_path).ontology
    assert tree is not None
    assert tree.path("Nevus") == ["Benign", "Benign melanocytic proliferations", "Nevus"]


@pytest.mark.parametrize(
    "columns", [{"image": "a", "diagnosis": "nevus"}, {"image_name": "a", "benign_malignant": "nevus"}]
)
def test_isic_of_older_challenges(tmp_path: Path, columns: dict[str, str]) -> None:
    write_table(tmp_path / "metadata.csv", [columns])
    (row,) = read("isic", tmp_path).table.to_pylist()
    assert (row["labels"], row["image"], row["group"]) == (["nevus"], "a.jpg", None)


def test_isic_without_a_diagnosis_says_so(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.csv", [{"isic_id": "a", "sex": "male"}])
    with pytest.raises(CorpusError, match=r"no column 'diagnosis_1' or 'diagnosis'; its columns are: isic_id, sex"):
        read("isic", tmp_path)


def test_ham10000_as_published_without_ending(tmp_path: Path) -> None:
    LAYOUTS["ham10000"].write(tmp_path)
    (tmp_path / "HAM10000_metadata.csv").rename(tmp_path / "HAM10000_metadata")
    first = read("ham10000", tmp_path).table.to_pylist()[0]
    assert (first["meta"]["age"], first["meta"]["body_site"], first["meta"]["extra"]) == (
        80.0,
        "scalp",
        '{"dx_type": "histo"}',
    )


def test_ham10000_needs_no_column_beyond_those_it_names(tmp_path: Path) -> None:
    LAYOUTS["ham10000"].write(tmp_path)
    table = tmp_path / "HAM10000_metadata.csv"
    lines = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    spare = lines[0].index("dx_type")
    table.write_text("\n".join(",".join(line[:spare] + line[spare + 1 :]) for line in lines), encoding="utf-8")
    assert {row["meta"]["extra"] for row in read("ham10000", tmp_path).table.to_pylist()} == {None}


def test_fitzpatrick_partitions_become_the_tree(tmp_path: Path) -> None:
    first = written("fitzpatrick17k", tmp_path)["b"]
    assert (first["skin_type"], first["hierarchy"]) == (5, "malignant, malignant melanoma")
    assert first["origin"] == "www.dermaamin.com"


def test_derm7pt_gives_both_images_criteria_and_splits(tmp_path: Path) -> None:
    found = written("derm7pt", tmp_path)
    derm, clinic = found["1-derm"], found["1-clinic"]
    assert (derm["image"], derm["origin"], clinic["origin"]) == ("images/NEL/d皮肤 图_1.jpg", "dermoscopic", "clinical")
    assert derm["concepts"] == ["atypical pigment network", "blue whitish veil"]
    assert [found[f"{case}-derm"]["split"] for case in (1, 2, 3)] == ["train", "val", "test"]
    tree = read("derm7pt", tmp_path).ontology
    assert tree is not None
    assert tree.path("clark nevus") == ["nevus", "clark nevus"]
    (tmp_path / "meta" / "test_indexes.csv").write_text("indexes\nx\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"test_indexes\.csv, column 'indexes'.*'x'"):
        read("derm7pt", tmp_path)
    (tmp_path / "meta" / "test_indexes.csv").unlink()
    assert set(read("derm7pt", tmp_path).table["split"].to_pylist()) == {None}


def test_skincon_concepts_diagnoses_and_rejected_images(tmp_path: Path) -> None:
    found = written("skincon", tmp_path)
    second = found["b.jpg"]
    assert second["concepts"] == ["papule", "flat topped", "brown(hyperpigmentation)"]
    assert captions(second) == [("raw", "This skin photo shows papule, flat topped, brown(hyperpigmentation).")]
    assert (second["labels"], second["skin_type"]) == (["malignant melanoma"], 5)
    dropped = read("skincon", tmp_path).dropped
    assert [(row.row, row.image, row.reason) for row in dropped] == [(4, "rejected.jpg", "excluded_by_source")]


def test_skincon_on_ddi(tmp_path: Path) -> None:
    write_table(tmp_path / "annotations_ddi.csv", [{"ImageID": "000001.png", "Scale": "1"}])
    write_table(tmp_path / "fitzpatrick17k.csv", [{"md5hash": "another", **FITZPATRICK}])
    write_table(
        tmp_path / "ddi_metadata.csv", [{"DDI_file": "000001.png", "skin_tone": "56", "disease": "folliculitis"}]
    )
    (row,) = read("skincon", tmp_path).table.to_pylist()
    assert (row["labels"], row["skin_type"]) == (["folliculitis"], None)


def test_skincon_without_concepts_says_so(tmp_path: Path) -> None:
    write_table(tmp_path / "annotations_ddi.csv", [{"ImageID": "000001.png", "note": "1"}])
    with pytest.raises(
        CorpusError, match="no column 'Papule' or another of the concepts; its columns are: ImageID, note"
    ):
        read("skincon", tmp_path)


def test_rows_that_the_source_excludes_do_not_stop_a_run(tmp_path: Path) -> None:
    LAYOUTS["skincon"].write(tmp_path / "raw")
    config = PrepareConfig(source="skincon", input=str(tmp_path / "raw"), output=str(tmp_path / "out"), split="test")
    work = read_work(config)
    assert [row.reason for row in work.plan.dropped] == ["excluded_by_source"]
    assert work.captions_from["raw"] == "the published sentence over the concepts"
    assert work.captions_from["ontology"].startswith("the published sentence")
    assert "sub" not in work.captions_from


def test_skincap_concepts_and_spreadsheets(tmp_path: Path) -> None:
    found = written("skincap", tmp_path)
    assert (found["1"]["concepts"], found["2"]["concepts"]) == (["papule"], [])
    assert captions(found["1"]) == [("raw", "A red patch.")]
    assert json.loads(found["1"]["meta"]["extra"])["caption_zh"] == "红斑"
    (tmp_path / "skincap_v240623.csv").rename(tmp_path / "skincap_v240623.xlsx")
    with pytest.raises(CorpusError, match=r"skincap_v240623\.xlsx is a spreadsheet: save it as CSV"):
        read("skincap", tmp_path)


def test_image_folder_classes_and_splits(tmp_path: Path) -> None:
    write_images(
        tmp_path, "train/psoriasis/a.jpg", "Validation/eczema/hand_eczema/b.png", "train/c.jpg", "test.tar.txt"
    )
    found = {row["source_id"]: row for row in read("image_folder", tmp_path).table.to_pylist()}
    assert {name: (row["split"], row["labels"]) for name, row in found.items()} == {
        "train/psoriasis/a.jpg": ("train", ["psoriasis"]),
        "Validation/eczema/hand_eczema/b.png": ("val", ["hand eczema"]),
        "train/c.jpg": ("train", []),
    }
    assert found["Validation/eczema/hand_eczema/b.png"]["hierarchy"] == "eczema, hand eczema"
    part = read("image_folder", tmp_path, table="train").table.to_pylist()
    assert [(row["image"], row["labels"], row["split"]) for row in part] == [
        ("train/c.jpg", [], None),
        ("train/psoriasis/a.jpg", ["psoriasis"], None),
    ]


def test_image_folder_takes_archives_for_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "psoriasis.zip", "w") as archive:
        archive.writestr("a.jpg", photograph(1))
    (row,) = read("image_folder", tmp_path).table.to_pylist()
    assert (row["image"], row["labels"]) == ("psoriasis.zip!/a.jpg", ["psoriasis"])


def test_webdataset_texts(tmp_path: Path) -> None:
    listed = [{"aspect": "ontology", "text": "o"}, {"aspect": "other", "text": "x"}, {"aspect": "raw", "text": " r  s"}]
    document = {"captions": listed, "labels": ["a", "b", "a"], "concepts": "red", "source": "derm1m", "split": "val"}
    write_samples(
        tmp_path / "0.tar",
        {
            "a": {"jpg": b"x", "json": json.dumps({**document, "camera": "phone", "exif": {}}).encode()},
            "b": {"jpg": b"x", "json": json.dumps({"label": "psoriasis", "key": "b"}).encode()},
            "c": {"jpg": b"x", "json": b"{not json"},
            "d": {"jpg": b"x", "txt": b"\xff\xfe"},
            "e": {"txt": b"no image"},
            "f": {"jpg": b"x", "seg.png": b"y", "txt": b"None"},
            "g": {"jpg": b"x", "json": b"[1]"},
        },
    )
    raw = read("webdataset", tmp_path)
    found = {row["row"]: row for row in raw.table.to_pylist()}
    assert [(row.row, row.reason) for row in raw.dropped] == [
        (3, "malformed_row"),
        (4, "malformed_row"),
        (7, "malformed_row"),
    ]
    assert captions(found[1]) == [("ontology", "o"), ("raw", "r s")]
    assert (found[1]["labels"], found[1]["concepts"], found[1]["source"], found[1]["split"]) == (
        ["a", "b"],
        ["red"],
        "derm1m",
        "val",
    )
    assert json.loads(found[1]["meta"]["extra"]) == {"camera": "phone", "captions": [listed[1]]}
    assert raw.not_understood == {"captions": {json.dumps([listed[1]]): 1}}
    assert captions(found[2]) == [("raw", "This is a skin photo diagnosed as psoriasis.")]
    assert (found[5]["image"], found[6]["captions"]) == (None, [])


def test_webdataset_images_are_addressed_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path / "0.tar", {"../a": {"jpg": b"out"}, "b": {"jpg": b"bytes of b", "txt": b"t"}})
    (row,) = read("webdataset", tmp_path).table.to_pylist()
    assert re.fullmatch(r"0\.tar!\d+\+10/b\.jpg", row["image"])
    # Nothing but this range of the archive is needed to fetch it.
    monkeypatch.delattr(archives, "members")
    store = ImageStore(str(tmp_path), max_bytes=100, follow_links=False)
    assert store.fetch(row["image"]).data == b"bytes of b"
    assert store.fetch("0.tar!99999+10/b.jpg").reason == "unreadable"
    assert store.fetch("0.tar!0+101/b.jpg").reason == "too_many_bytes"


def test_webdataset_archives_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no \.tar archive"):
        read("webdataset", tmp_path)
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"0\.tar\.gz is compressed: gunzip it"):
        read("webdataset", tmp_path)
    write_samples(tmp_path / "1.tar", {"a": {"jpg": bytes(4000)}, "b": {"jpg": bytes(4000)}})
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:3000])
    with pytest.raises(CorpusError, match=r"1\.tar is not a complete, uncompressed tar archive"):
        read("webdataset", tmp_path)
    with pytest.raises(CorpusError, match=r"nowhere\.tar does not exist"):
        read("webdataset", tmp_path, table="nowhere.tar")


ANNOUNCED = {
    "text": ("train.txt", "val.txt", lambda entries: "\n".join(map(str, entries))),
    "csv": ("train_indices.csv", "val_indices.csv", lambda entries: "index\n" + "\n".join(map(str, entries))),
    "json": ("train.json", "validation.json", json.dumps),
}


@pytest.mark.parametrize("kind", sorted(ANNOUNCED))
@pytest.mark.parametrize(
    "listed",
    [
        ([0, 1, 4], [2, 1]),
        ([1, 2, 5], [3, 2]),
        (["a.jpg", "b.jpg", "e.jpg"], ["images/c.jpg", "b.jpg", "nowhere.jpg"]),
    ],
)
def test_the_layout_that_derm1m_announces(tmp_path: Path, kind: str, listed: tuple[list[object], list[object]]) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    row = {name: "x" for name in derm1m.REQUIRED if name != "truncated_caption"}
    rows = [{**row, "filename": name, "caption": "a caption"} for name in names]
    write_table(tmp_path / "captions.csv", rows)
    (tmp_path / "ontology.json").write_text('{"root": ["x"]}')
    (tmp_path / "splits").mkdir()
    for file, entries in zip(ANNOUNCED[kind][:2], listed, strict=True):
        (tmp_path / "splits" / file).write_text(ANNOUNCED[kind][2](entries))
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    raw = read("derm1m", tmp_path)
    found = {row["source_id"]: (row["split"], row["image"]) for row in raw.table.to_pylist()}
    assert found["a.jpg"] == ("train", "images/a.jpg")
    assert found["c.jpg"] == ("val", "images/c.jpg")
    assert {row.reason for row in raw.dropped} == {"split_unclear"}
    told = {row.source_id: row.detail for row in raw.dropped}
    assert "train and val of" in told["b.jpg"]
    assert "no file of" in told["d.jpg"]
    assert raw.num_rows == len(names)


def test_both_layouts_of_derm1m_at_once_are_refused(tmp_path: Path) -> None:
    for name in (derm1m.TABLE_NAME, "captions.csv"):
        (tmp_path / name).write_text("filename\na.jpg\n")
    with pytest.raises(CorpusError, match=r"two layouts of Derm1M: name one with table="):
        read("derm1m", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.txt": "2\n3"}, "counted from 0 or from 1"),
        ({"train.txt": "0\n5"}, "counted from 0 or from 1"),
        ({"train.txt": "1\n9"}, "counted from 0 or from 1"),
        ({"train.txt": "1", "train.json": "[1]"}, "both list the split train"),
        ({"other.txt": "1"}, "lists no split"),
        ({"train.json": '{"a": 1}'}, "must hold a list"),
        ({"train.json": "[" * 5000}, "cannot be read"),
        ({"train.csv": "a,b\n1,2"}, "none of the columns"),
    ],
)
def test_lists_of_splits_that_say_nothing_certain(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write_table(tmp_path / "captions.csv", [dict.fromkeys((*derm1m.REQUIRED, "caption"), "x")] * 5)
    (tmp_path / "splits").mkdir()
    for name, content in files.items():
        (tmp_path / "splits" / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        read("derm1m", tmp_path)
