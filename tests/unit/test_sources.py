"""Source readers: what the published tables hold, quirks included, must come through right."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.errors import CorpusError
from dermray.raw.sources import READERS, RawRows, SourceRequest, derm1m
from dermray.raw.sources.rows import RAW, Columns, of_patients, raw_captions, text

DERM1M_ROW = {
    "filename": "youtube/a_frame_1_0.jpg",
    "caption": "the whole caption, which is longer",
    "truncated_caption": "a caption",
    "source": "youtube",
    "source_type": "edu",
    "disease_label": "psoriasis",
    "hierarchical_disease_label": "inflammatory, non-infectious, psoriasis",
    "skin_concept": "red, patch",
    "body_location": "neck",
    "symptoms": "tender",
    "age": "45",
    "gender": "male",
}
PAD_ROW = {
    "filename": "images/PAT_1_2_3.jpg",
    "img_id": "PAT_1_2_3.png",
    "patient_id": "PAT_1",
    "lesion_id": "2",
    "diagnostic": "BCC",
    "fitspatrick": "2.0",
    "region": "NECK",
    "age": "79",
    "gender": "FEMALE",
    "itch": "True",
    "bleed": "False",
    "grew": "UNK",
    "smoke": "False",
}


def write_table(file: Path, rows: Sequence[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.DictWriter(sink, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_derm1m(folder: Path, *rows: dict[str, str]) -> list[dict[str, Any]]:
    write_table(folder / derm1m.TABLE_NAME, [{**DERM1M_ROW, **row} for row in rows])
    (folder / "ontology.json").write_text(json.dumps({"root": ["psoriasis"]}), encoding="utf-8")
    return checked(READERS["derm1m"](SourceRequest(str(folder)))).table.to_pylist()


def read_csv(folder: Path, rows: Sequence[dict[str, str]], **columns: Any) -> RawRows:
    write_table(folder / "metadata.csv", rows)
    return checked(READERS["csv"](SourceRequest(str(folder), columns=Columns(**columns))))


def checked(raw: RawRows) -> RawRows:
    assert raw.table.schema.equals(RAW)
    raw.table.validate(full=True)
    for field in RAW:
        assert field.nullable or raw.table[field.name].null_count == 0
    return raw


def test_derm1m_row(tmp_path: Path) -> None:
    (row,) = read_derm1m(tmp_path, {})
    assert row == {
        "row": 1,
        "source": "derm1m",
        "source_id": "youtube/a_frame_1_0.jpg",
        "image": "youtube/a_frame_1_0.jpg",
        "captions": [{"aspect": "raw", "text": "a caption"}],
        "labels": ["psoriasis"],
        "hierarchy": "inflammatory, non-infectious, psoriasis",
        "concepts": ["red", "patch"],
        "skin_type": None,
        "group": "youtube/a",
        "split": None,
        "origin": "youtube",
        "meta": {
            "age": 45.0,
            "sex": "male",
            "body_site": "neck",
            "symptoms": "tender",
            "patient_id": None,
            "lesion_id": None,
            "extra": '{"source": "youtube", "source_type": "edu"}',
        },
        "prepared": None,
        "phash": None,
        "modality": None,
    }


def test_derm1m_placeholders_are_nulls(tmp_path: Path) -> None:
    (row,) = read_derm1m(
        tmp_path,
        {
            "disease_label": "no definitive diagnosis",
            "hierarchical_disease_label": "",
            "skin_concept": "No visual concepts",
            "body_location": "No body location information",
            "symptoms": "No symptom information",
            "age": "No age information",
            "gender": "No gender information",
        },
    )
    assert row["labels"] == []
    assert row["concepts"] == []
    assert row["hierarchy"] is None
    assert [row["meta"][key] for key in ("age", "sex", "body_site", "symptoms")] == [None] * 4


def test_derm1m_difficult_cells(tmp_path: Path) -> None:
    rows = read_derm1m(
        tmp_path,
        {
            "filename": "edu/皮肤病彩色图谱OCR_00407_20333_1.jpg",
            "truncated_caption": 'He said "dirty neck",\nthen left.\r\n\nNone',
        },
        {
            "filename": "note/Habif, Thomas P. - Clinical (5th ed.)  -部分1_00477_26235_0.png",
            "truncated_caption": "None",
        },
        {"filename": " leading space.jpg", "disease_label": "lichen planus, psoriasis", "truncated_caption": "  "},
    )
    assert rows[0]["image"] == "edu/皮肤病彩色图谱OCR_00407_20333_1.jpg"
    assert rows[0]["captions"][0]["text"] == 'He said "dirty neck", then left. None'
    assert rows[1]["image"] == "note/Habif, Thomas P. - Clinical (5th ed.)  -部分1_00477_26235_0.png"
    assert rows[1]["captions"] == []
    assert rows[2]["image"] == " leading space.jpg"
    assert rows[2]["labels"] == ["lichen planus, psoriasis"]
    assert rows[2]["captions"] == []


@pytest.mark.parametrize(
    ("filename", "group"),
    [
        ("youtube/TyY1qef8dIM_frame_562_0.jpg", "youtube/TyY1qef8dIM"),
        ("youtube/c-YDJ_jfBSeg_frame_9159_0.jpg", "youtube/c-YDJ_jfBSeg"),
        ("IIYI/26294_2.png", "IIYI/26294"),
        ("pubmed/71_4d_PMC5447336_IDOJ_8_176_g002_4.png", "PMC5447336"),
        ("edu/皮肤病彩色图谱OCR_00407_20333_1.jpg", "edu/皮肤病彩色图谱OCR_00407"),
        ("edu/Dermatology Made Easy-OCR2_00103_03780.png", "edu/Dermatology Made Easy-OCR2_00103"),
        ("public/keloids-66.jpg", None),
    ],
)
def test_derm1m_groups(filename: str, group: str | None) -> None:
    assert derm1m.group_of(filename) == group


def test_derm1m_wants_its_tree_table_and_columns(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=rf"{tmp_path}/Derm1M_v2_pretrain.csv does not exist"):
        READERS["derm1m"](SourceRequest(str(tmp_path)))
    write_table(tmp_path / "other.csv", [{"filename": "a.jpg", "caption": "x"}])
    with pytest.raises(CorpusError, match=r"no column 'truncated_caption'; its columns are: filename, caption"):
        READERS["derm1m"](SourceRequest(str(tmp_path), table="other.csv"))
    write_table(tmp_path / derm1m.TABLE_NAME, [DERM1M_ROW])
    with pytest.raises(CorpusError, match=r"ontology\.json does not exist"):
        READERS["derm1m"](SourceRequest(str(tmp_path)))


def test_pad_row(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.csv", [PAD_ROW, {**PAD_ROW, "diagnostic": "NEV", "fitspatrick": "", "itch": ""}])
    raw = checked(READERS["pad_ufes_20"](SourceRequest(str(tmp_path))))
    first, second = raw.table.to_pylist()
    assert first["captions"][0]["text"] == "This is a skin photo diagnosed as basal cell carcinoma."
    assert first["labels"] == ["basal cell carcinoma"]
    assert (first["skin_type"], first["group"], first["source_id"]) == (2, "PAT_1", "PAT_1_2_3.png")
    assert first["meta"] == {
        "age": 79.0,
        "sex": "female",
        "body_site": "neck",
        "symptoms": "itch",
        "patient_id": "PAT_1",
        "lesion_id": "2",
        "extra": '{"smoke": "False"}',
    }
    assert (second["labels"], second["skin_type"], second["meta"]["symptoms"]) == (["nevus"], None, None)
    assert raw.ontology is not None
    assert sorted(raw.ontology) == sorted(
        [
            "nevus",
            "basal cell carcinoma",
            "actinic keratosis",
            "seborrheic keratosis",
            "squamous cell carcinoma",
            "melanoma",
        ]
    )


def test_pad_without_file_names_and_diagnosis(tmp_path: Path) -> None:
    row = {key: value for key, value in PAD_ROW.items() if key != "filename"}
    write_table(tmp_path / "metadata.csv", [{**row, "diagnostic": ""}])
    (found,) = checked(READERS["pad_ufes_20"](SourceRequest(str(tmp_path)))).table.to_pylist()
    assert found["image"] == "images/PAT_1_2_3.png"
    assert (found["captions"], found["labels"]) == ([], [])


def test_csv_with_default_names(tmp_path: Path) -> None:
    raw = read_csv(
        tmp_path,
        [
            {"image": "a.jpg", "caption": "text", "label": "x", "skin_type": "III", "split": "test", "camera": "phone"},
            {"image": "", "caption": "", "label": "", "skin_type": "-1", "split": "", "camera": ""},
        ],
    )
    first, second = raw.table.to_pylist()
    assert (first["image"], first["captions"], first["labels"]) == ("a.jpg", [{"aspect": "raw", "text": "text"}], ["x"])
    assert (first["skin_type"], first["split"], first["source"], first["source_id"]) == (3, "test", "csv", "a.jpg")
    assert first["meta"]["extra"] == '{"camera": "phone"}'
    assert (second["image"], second["captions"], second["labels"], second["skin_type"]) == (None, [], [], None)
    assert second["meta"]["extra"] is None
    assert raw.ontology is None


def test_csv_with_named_columns(tmp_path: Path) -> None:
    rows = [
        {"file": "1.png", "dx": "a;b", "dx2": "c", "who": "p1", "site": "arm", "years": "61 years", "set": "hospital"},
        {"file": "2.png", "dx": "", "dx2": "", "who": "", "site": "", "years": "old", "set": ""},
    ]
    raw = read_csv(
        tmp_path,
        rows,
        image="file",
        caption=None,
        label=["dx", "dx2"],
        label_separator=";",
        patient_id="who",
        body_site="site",
        age="years",
        source="set",
        group=["who", "site"],
    )
    first, second = raw.table.to_pylist()
    assert first["labels"] == ["a", "b", "c"]
    assert first["captions"][0]["text"] == "This is a skin photo diagnosed as a, b, c."
    assert (first["group"], first["source"], first["meta"]["age"]) == ("p1/arm", "hospital", 61.0)
    assert (second["group"], second["source"], second["captions"]) == (None, "csv", [])


def test_csv_groups_by_patient_when_no_group_is_named(tmp_path: Path) -> None:
    rows = [
        {"image": "1", "caption": "x", "patient_id": "p", "lesion_id": "l"},
        {"image": "2", "caption": "x", "patient_id": "", "lesion_id": "l"},
    ]
    assert read_csv(tmp_path, rows).table["group"].to_pylist() == ["p", "l"]


def test_csv_takes_a_tree_that_lies_there(tmp_path: Path) -> None:
    (tmp_path / "ontology.json").write_text('{"root": ["a"]}', encoding="utf-8")
    raw = read_csv(tmp_path, [{"image": "1", "caption": "x"}])
    assert raw.ontology is not None
    assert list(raw.ontology) == ["a"]


def test_csv_missing_columns_are_named(tmp_path: Path) -> None:
    rows = [{"path": "1.png", "text": "x", "image": "1.png"}]
    with pytest.raises(CorpusError, match=r"no column 'file'; its columns are: path, text, image"):
        read_csv(tmp_path, rows, image="file")
    with pytest.raises(CorpusError, match=r"no column 'dx'"):
        read_csv(tmp_path, rows, caption="text", label="dx")
    with pytest.raises(CorpusError, match=r"neither captions \(caption\) nor labels \(label\); its columns are: path"):
        read_csv(tmp_path, rows)


def test_settings_printed_in_full_read_the_same(tmp_path: Path) -> None:
    """`--print-config` writes every default; naming a default must not make its column required."""
    rows = [{"image": "1.png", "caption": "x"}]
    assert read_csv(tmp_path, rows, **Columns().model_dump()).table.equals(read_csv(tmp_path, rows).table)


def test_malformed_rows_are_set_aside_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        'image,caption\na.jpg,"one\nline"\nb.jpg\nc.jpg,three\nd.jpg,four,five\ne.jpg,six\n', encoding="utf-8"
    )
    raw = checked(READERS["csv"](SourceRequest(str(tmp_path))))
    assert raw.table["row"].to_pylist() == [1, 3, 5]
    assert [(row.row, row.reason) for row in raw.dropped] == [(2, "malformed_row"), (4, "malformed_row")]
    assert "3 cells where the header has 2" in raw.dropped[1].detail
    assert raw.num_rows == 5
    limited = READERS["csv"](SourceRequest(str(tmp_path), limit=3))
    assert limited.table["row"].to_pylist() == [1, 3]
    assert limited.num_rows == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"image,caption\n", "has no rows"),
        (b"image,caption,image\n1,2,3\n", "repeats the column 'image'"),
        (b"image,caption\n1.png,caf\xe9\n", "is not text in UTF-8: line 2 holds the byte 0xE9"),
    ],
)
def test_unusable_tables(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        READERS["csv"](SourceRequest(str(tmp_path)))


def test_byte_order_mark_tabs_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes("\ufeffimage,caption\n1.png,é\n".encode())
    (tmp_path / "tabs.tsv").write_text("image\tcaption\n1.png\té\n", encoding="utf-8")
    pq.write_table(pa.table({"image": ["1.png"], "caption": ["é"], "age": [30]}), tmp_path / "rows.parquet")
    for table in ("bom.csv", "tabs.tsv", "rows.parquet"):
        (row,) = checked(READERS["csv"](SourceRequest(str(tmp_path), table=table))).table.to_pylist()
        assert (row["image"], row["captions"][0]["text"]) == ("1.png", "é")


def test_cells() -> None:
    assert text(pa.array(["  a \n b ", "N/A", "none", "", "no pain", "Unknown", "No age information"])).to_pylist() == [
        "a b",
        None,
        None,
        None,
        "no pain",
        None,
        None,
    ]


def test_raw_captions() -> None:
    assert raw_captions(pa.array([None, "a", None, "b"], pa.string())).to_pylist() == [
        [],
        [{"aspect": "raw", "text": "a"}],
        [],
        [{"aspect": "raw", "text": "b"}],
    ]


def test_patients_as_tables_write_them() -> None:
    ages = {"45": 45, "45.5": 45.5, "45,5": 45.5, "3 yr": 3, "80 years old": 80, "45 yo": 45, "45 y/o": 45, "age 7": 7}
    ranges = {"AGE_30_TO_39": 34.5, "45-49": 47, "45\u201349 years": 47, "85+": 85, ">85": 85, "80 and over": 80}
    parts = {"6 months": 0.5, "6 mo": 0.5, "365 days": 365 / 365.25}
    unread = ["150", "six", "-4", "49-45", "45 M", "AGE_SOME", "4 5", "1/2", "12 / 45", "1,234"]
    cells = [*ages, *ranges, *parts, *unread, "", "unknown"]
    said = of_patients(len(cells), age=pa.array(cells))
    known = [*ages.values(), *ranges.values(), *parts.values()]
    assert said.age.to_pylist()[: len(known)] == pytest.approx(known)
    assert said.age.to_pylist()[len(known) :] == [None] * (len(unread) + 2)
    assert said.as_written["age"].drop_null().to_pylist() == [*ranges, *unread]
    assert said.not_understood == {"age": dict.fromkeys(unread, 1)}


def test_sexes_and_skin_types_as_tables_write_them() -> None:
    sexes = {"F": "female", "f": "female", "woman": "female", "FEMALE": "female", "M": "male", "Man": "male"}
    said = of_patients(len(sexes) + 2, sex=pa.array([*sexes, "x", "N/A"]))
    assert said.sex.to_pylist() == [*sexes.values(), None, None]
    assert said.not_understood == {"sex": {"x": 1}}
    types = {
        "1": 1,
        "2.0": 2,
        "IV": 4,
        "type vi": 6,
        "FST3": 3,
        "FST III": 3,
        "FST-IV": 4,
        "Fitzpatrick 2": 2,
        "skin type 5": 5,
    }
    types |= {"fst_iv": 4, "Type: II": 2, "skin type. V": 5}
    # Two types in a cell are not the one that their letters make together.
    unread = ["0", "7", "3.5", "I/II", "I / II", "I. / II.", "I_II", "V/I", "I.V", "1/2"]
    said = of_patients(len(types) + len(unread) + 2, skin_type=pa.array([*types, *unread, "", "-1"]))
    assert said.skin_type.to_pylist() == [*types.values(), *[None] * (len(unread) + 2)]
    assert said.not_understood == {"skin_type": dict.fromkeys(unread, 1)}


def test_lists_in_a_cell_are_lists(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        "image,label,age,note\n"
        "a.png,\"['Eczema', 'Psoriasis']\",AGE_30_TO_39,x\n"
        'b.png,"[""Acne""]",forty,\n'
        "c.png,[melanoma,45,\n"
    )
    rows = READERS["csv"](SourceRequest(str(tmp_path)))
    assert rows.table["labels"].to_pylist() == [["Eczema", "Psoriasis"], ["Acne"], ["[melanoma"]]
    extra = [json.loads(each["extra"]) if each["extra"] else None for each in rows.table["meta"].to_pylist()]
    assert extra == [{"note": "x", "age": "AGE_30_TO_39"}, {"age": "forty"}, None]
    assert rows.not_understood == {"age": {"forty": 1}}
