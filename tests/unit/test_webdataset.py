"""Captions and fields of WebDataset samples: what is understood, and what is kept and told where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dermray.raw import sources
from dermray.raw.sources import RawRows, SourceRequest
from tests.raw_sources import write_samples


def read(folder: Path) -> RawRows:
    return sources.read("webdataset", SourceRequest(str(folder)))


@pytest.mark.parametrize(
    ("document", "txt", "texts"),
    [
        ({"caption": ["A.", "B ", "nan", "A."]}, None, ["A.", "B"]),
        ({"caption": "['A.', 'B']"}, None, ["A.", "B"]),
        ({"caption": "B"}, "A.", ["A.", "B"]),
        ({"caption": "A."}, "A.\n", ["A."]),
        ({"caption": "A.", "text": "B"}, None, ["A.", "B"]),
        ({"caption": "A.", "text": "B", "captions": ["C", {"text": "D"}]}, "None", ["A.", "B", "C", "D"]),
        ({"captions": "A."}, "", ["A."]),
        ({"captions": {"raw": "A.", "sub": "B"}}, None, ["A.", "B"]),
        ({"captions": {"aspect": None, "text": "A."}, "text": {"raw": "B"}}, None, ["B", "A."]),
    ],
)
def test_webdataset_keeps_every_caption(
    tmp_path: Path, document: dict[str, object], txt: str | None, texts: list[str]
) -> None:
    files = {"jpg": b"x", "json": json.dumps(document).encode(), **({} if txt is None else {"txt": txt.encode()})}
    write_samples(tmp_path / "0.tar", {"a": files})
    raw = read(tmp_path)
    (row,) = raw.table.to_pylist()
    assert [each["text"] for each in row["captions"]] == texts
    assert (row["meta"]["extra"], raw.not_understood) == (None, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("caption", {"en": "A patch."}),
        ("text", [["A patch."]]),
        ("captions", [{"aspect": "vlm", "text": "A patch."}]),
        ("label", {"name": "BCC"}),
        ("labels", [True]),
        ("concepts", [{"plaque": 1}]),
        ("age", [45, 46]),
        ("sex", False),
        ("patient_id", {"id": 7}),
        ("split", ["train", "val"]),
    ],
)
def test_webdataset_keeps_and_tells_what_it_does_not_understand(tmp_path: Path, field: str, value: object) -> None:
    document = {"caption": "A lesion.", "labels": ["Nevus"], "boxes": [[1, 2], {"x": 0.5}], "site": {"a": None}} | {
        field: value
    }
    write_samples(tmp_path / "0.tar", {key: {"jpg": b"x", "json": json.dumps(document).encode()} for key in "ab"})
    raw = read(tmp_path)
    for row in raw.table.to_pylist():
        extra = json.loads(row["meta"]["extra"])
        assert (extra.pop("boxes"), extra.pop("site")) == ([[1, 2], {"x": 0.5}], {"a": None})
        kept = extra.pop(field)
        assert kept in (value, [value])
        assert extra == {}
    assert raw.not_understood == {field: {json.dumps(kept): 2}}


def test_webdataset_reads_lists_in_texts(tmp_path: Path) -> None:
    documents = [
        {"caption": "A.", "labels": "['Eczema', 'Psoriasis']", "concepts": "Red, scaly"},
        {"caption": "A.", "label": ["Eczema", "nan", 3], "concepts": ["Red", "scaly", "red"]},
    ]
    samples = {f"{n}": {"jpg": b"x", "json": json.dumps(one).encode()} for n, one in enumerate(documents)}
    write_samples(tmp_path / "0.tar", samples)
    rows = read(tmp_path).table.to_pylist()
    assert [row["labels"] for row in rows] == [["Eczema", "Psoriasis"], ["Eczema", "3"]]
    assert [row["concepts"] for row in rows] == [["red", "scaly"]] * 2
