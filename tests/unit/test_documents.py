"""Crafted JSON and YAML, and odd texts of keys: one line each, in every place that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from dermray import config, documents, storage
from dermray.config import Config
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import DermRayError, DocumentError
from dermray.models import layout
from dermray.release import gate
from dermray.train import failures
from dermray.tuning.basis import Basis
from dermray.tuning.records import RECORD_NAME, Status, TrialRecord
from dermray.vectors.index.vectors import VectorIndex

JSON = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "closed and deep": "[" * 80 + "]" * 80,
    "huge integer": '{"a": ' + "1" * 5000 + "}",
    "half a pair": '{"a": "\\ud800"}',
    "cut off": '{"a": [1, 2',
    "no JSON": "nope",
    "empty": "",
    "not UTF-8": b"\xff\xfe{}",
    "a list": "[]",
    "null": "null",
}
YAML = {
    "deep lists": "a: " + "[" * 10_000,
    "deep blocks": "- " * 5000 + "a",
    "huge integer": "count: " + "1" * 5000,
    "laughs": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "alias of itself": "a: &a [*a]",
    "tag": "a: !!python/object/apply:os.system [ls]",
    "binary": "a: !!binary x",
    "key is a list": "? [a]\n: 1",
    "twice": "uri: a\nuri: b",
    "null character": "uri: a\0b",
    "merge of a number": "<<: 3",
    "two documents": "uri: a\n---\nuri: b",
    "unclosed": "{uri: a",
    "date for a number": "count: 2026-02-30",
    "too large": "uri: " + "x" * (2 << 20),
}
FILES: dict[str, tuple[str, Callable[[str], object]]] = {
    "any": ("x.json", lambda at: _mapping(storage.read_json(f"{at}/x.json"))),
    "manifest": ("manifest.json", Manifest.load),
    "ontology": ("ontology.json", Ontology.load),
    "model": (layout.CONFIG_NAME, layout.read_config),
    "index": ("index.json", VectorIndex.load),
    "trial": (RECORD_NAME, lambda at: TrialRecord.load(_trial(at))),
    "failure": (f"{failures.NOTE_PREFIX}00000.json", failures.repeated),
    "report": ("report.json", gate.load_report),
}


def _trial(at: str) -> Any:
    return SimpleNamespace(name="trial-000", params={"a": 1}, basis=Basis("c", {}), uri=at)


def _mapping(document: object) -> object:
    if not isinstance(document, dict):
        raise DocumentError("no object")
    return document


class Keys(Config):
    uri: str = Field("", description="a text")
    name: str | None = Field(None, description="a text or nothing")
    names: tuple[str, ...] = Field((), description="texts")
    count: int = Field(3, description="a number")
    split: str | dict[str, float] = Field("x", description="a text or shares")


@pytest.mark.parametrize("crafted", sorted(JSON))
@pytest.mark.parametrize("reader", sorted(FILES))
def test_crafted_json_is_refused_in_one_line(tmp_path: Path, crafted: str, reader: str) -> None:
    name, read = FILES[reader]
    data = JSON[crafted]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DermRayError) as caught:
        read(str(tmp_path))
    assert "\n" not in str(caught.value).strip()[:200]


@pytest.mark.parametrize("crafted", sorted(YAML))
@pytest.mark.parametrize("as_file", [True, False])
def test_crafted_yaml_is_refused_in_one_line(tmp_path: Path, crafted: str, as_file: bool) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(YAML[crafted])
    arguments = ["--config", str(file)] if as_file else [f"count={YAML[crafted].partition('count: ')[2] or '[' * 5000}"]
    with pytest.raises(DermRayError) as caught:
        config.parse(Keys, arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


TEXTS = (
    "W/clinic #1",
    "|",
    "2026_11",
    "0042",
    "12:30",
    "1.10",
    "no",
    "null",
    "2026-02-30",
    "a: b",
    "[old] images",
    "'q'",
    "~",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_its_text_as_it_stands(text: str) -> None:
    parsed = config.parse(Keys, [f"uri={text}", f"name={text}"])
    assert (parsed.uri, parsed.name) == (text, text)
    assert config.parse(Keys, [], {"uri": text}).uri == text


def test_in_a_file_a_number_where_text_is_wanted_keeps_its_spelling(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("uri: 0042\nname: 1.10\nnames: [2026_11, 12:30, no]\ncount: 0x10\nsplit: {train: 0.5}\n")
    parsed = config.parse(Keys, ["--config", str(file)])
    assert (parsed.uri, parsed.name, parsed.count) == ("0042", "1.10", 16)
    assert parsed.names == ("2026_11", "12:30", "no")
    assert parsed.split == {"train": 0.5}


@pytest.mark.parametrize(
    "written",
    [
        "uri: W/clinic #1\n",
        "uri: W/clinic # 1\n",
        "uri: W/clinic\t## 1\n",
        "uri: u\nnames:\n- a\n- b  #2\n",
        "uri: u\nnames: [a, b # 2\n]\n",
        "uri: über Straße #7\r\ncount: 3\r\n",
    ],
)
def test_a_text_that_a_file_would_cut_is_refused_and_a_comment_is_none(tmp_path: Path, written: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(written)
    with pytest.raises(
        DermRayError, match=r"(uri|names.1): '.*' is followed by '#+ ?\d', which YAML takes for a comment"
    ):
        config.parse(Keys, ["--config", str(file)])
    file.write_text("uri: 'W/clinic #1' # of 2026\nname: a#1  # x\nnames: [b] #c\ncount: 3 #three\n## end\n")
    parsed = config.parse(Keys, ["--config", str(file)])
    assert (parsed.uri, parsed.name, parsed.names, parsed.count) == ("W/clinic #1", "a#1", ("b",), 3)


def test_all_that_is_wrong_is_told_at_once_unknown_names_first() -> None:
    with pytest.raises(DermRayError) as caught:
        config.parse(Keys, ["count=many", "nmaes=[a]", "--nonsense"])
    said = str(caught.value)
    assert said.index("unknown key 'nmaes', did you mean 'names'") < said.index("count: ")
    assert "--nonsense" in said


def test_plain_values_are_those_of_yaml() -> None:
    tree = documents.plain(documents.parse_yaml("a: 1e-4\nb: .inf\nc: off\nd: ~\ne: '7'\nf: 0b11", "x"))
    assert tree == {"a": 1e-4, "b": float("inf"), "c": False, "d": None, "e": "7", "f": 3}


def test_what_a_trial_and_a_failed_rank_leave_on_disk_shows_no_secret(tmp_path: Path) -> None:
    said = "no answer from postgresql://u:Kan4ry-S3cret@h/d"
    record = TrialRecord("trial-000", {"a": 1})
    record.end(Status.FAILED, said)
    record.save(_trial(str(tmp_path)))
    failures.record(str(tmp_path), 0, 3, DermRayError(said))
    assert TrialRecord.load(_trial(str(tmp_path))).error == "no answer from postgresql://(hidden)@h/d"
    assert not [file for file in tmp_path.rglob("*.json") if "Kan4ry" in file.read_text()]
