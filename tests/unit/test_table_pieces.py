"""A long table read in pieces by tasks: the same rows, drops, counts and errors as one reader gives."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dermray.errors import CorpusError, StorageError
from dermray.raw import cutting
from dermray.raw.cutting import cut
from dermray.raw.sources import READERS, SourceRequest
from dermray.raw.sources.rows import Columns
from tests.raw_sources import LAYOUTS
from tests.table_tasks import backwards, in_small_pieces

NUM_ROWS = 200


class Told:
    """Reads pieces, and keeps what became of each."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def __call__(self, pieces: Mapping[str, Any], work: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        for name, found in backwards(pieces, work):
            self.done.append(found)
            yield name, found


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as source:
        return list(csv.DictReader(source))


def long_table(file: Path, *, odd: bool = True, end: str = "\n") -> bytes:
    """The rows of a table over and over, with what rows may hold; some have a cell too many, or too few."""
    base = rows_of(file)
    header = list(base[0])
    caption = "truncated_caption" if "truncated_caption" in header else "caption"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    writer.writerow(header)
    for number in range(NUM_ROWS):
        cells = list(base[number % len(base)].values())
        cells[header.index("filename") if "filename" in header else 0] = f"images/{number:04d}.png"
        if odd and number % 7 == 0:
            cells[header.index(caption)] = f'two{end}lines, and ""marks"", {number}'
        if odd and number % 50 == 43:
            cells = [*cells, "more"] if number % 100 == 43 else cells[:-1]
        writer.writerow(cells)
        if odd and number % 30 == 29:
            text.write(end)
    return text.getvalue().encode()


def outcome(source: str, folder: Path, request: SourceRequest) -> dict[str, Any]:
    raw = READERS[source](replace(request, input=str(folder)))
    found = raw.table.combine_chunks()
    found.validate(full=True)
    return {
        "table": found.to_pylist(),
        "schema": found.schema,
        "dropped": raw.dropped,
        "not understood": raw.not_understood,
        "from": raw.captions_from,
        "findings": request.findings,
        "order": list(request.findings.placeholders),
        "met": request.rows_met,
        "tables": request.tables,
    }


@pytest.fixture(params=["csv", "derm1m", "make_table"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def table(source: str, tmp_path: Path) -> Path:
    LAYOUTS[source].write(tmp_path)
    return tmp_path / LAYOUTS[source].table


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"sep=,\r\n"], ids=["plain", "mark", "separator"])
def test_pieces_hold_the_rows_of_the_table(
    begin: bytes, source: str, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_bytes(begin + long_table(table, end="\r\n" if begin else "\n"))
    columns = Columns(modality="site") if source == "csv" and "site" in rows_of(table)[0] else Columns()
    one = outcome(source, table.parent, SourceRequest("", columns=columns))
    assert one["dropped"]
    assert len(one["table"]) + len(one["dropped"]) >= NUM_ROWS
    in_small_pieces(monkeypatch, 2048)
    told = Told()
    assert outcome(source, table.parent, SourceRequest("", columns=columns, tasks=told)) == one
    assert len(told.done) > 3
    assert None not in told.done, "a piece was cut inside a row"


@pytest.mark.parametrize("source", ["csv", "derm1m"])
def test_a_cut_inside_a_cell_is_noticed(source: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that means itself makes a newline between two marks look like the end of a row."""
    lines = long_table(table, odd=False).splitlines(keepends=True)
    width = len(next(csv.reader([lines[1].decode()])))
    odd = ",".join(["1.png", '5" wide', *["x"] * (width - 2)]).encode() + b"\n"
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(["2.png", "a\n" * 3000, *["y"] * (width - 2)])
    table.write_bytes(b"".join([lines[0], odd, text.getvalue().encode(), odd, *lines[1:]]))
    one = outcome(source, table.parent, SourceRequest(""))
    in_small_pieces(monkeypatch, 2048)
    told = Told()
    assert outcome(source, table.parent, SourceRequest("", tasks=told)) == one
    assert None in told.done


@pytest.mark.parametrize("place", [20, NUM_ROWS], ids=["inside", "last"])
def test_a_mark_that_is_never_closed_is_the_same_error(
    place: int, source: str, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = long_table(table, odd=False).splitlines(keepends=True)
    first, _, last = lines[place].rpartition(b",")
    lines[place] = b",".join((first, b'"' + last))
    table.write_bytes(b"".join(lines))
    with pytest.raises(CorpusError) as one:
        outcome(source, table.parent, SourceRequest(""))
    in_small_pieces(monkeypatch, 2048)
    with pytest.raises(CorpusError) as many:
        outcome(source, table.parent, SourceRequest("", tasks=backwards))
    assert str(many.value) == str(one.value)


def test_a_table_that_changes_meanwhile_is_refused(source: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_bytes(long_table(table))
    in_small_pieces(monkeypatch, 2048)

    def meddling(pieces: Mapping[str, Any], work: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        table.write_bytes(table.read_bytes())
        return backwards(pieces, work)

    with pytest.raises(CorpusError, match="has changed while it was read"):
        outcome(source, table.parent, SourceRequest("", tasks=meddling))
    monkeypatch.setattr(cutting.os, "pread", failing)
    with pytest.raises(StorageError, match=f"^{table}: .*Input/output error"):
        outcome(source, table.parent, SourceRequest("", tasks=backwards))


def failing(*_: int) -> bytes:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a,b\n1,2\n".encode("utf-16"), id="utf-16"),
        pytest.param(b"a,\n" + b"1,2\n" * 20, id="column without a name"),
        pytest.param(b"a,b\n1," + b"x" * 50 + b"\n1,2\n", id="long row"),
        pytest.param(b"a,b\r" + b"1,2\r" * 20, id="old Macintosh"),
        pytest.param(b"a,b\n" + b"1,2\n" * 20 + b'1,2"\n\n', id="last line"),
    ],
)
def test_what_only_one_reader_can_tell_is_not_cut(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert cut("t.csv", (tmp_path / "t.csv").open("rb", buffering=0), 32) is None


def test_where_a_table_is_cut(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'a,b\n1,2\n"\n",4\n5,6\n')
    found = cut("t.csv", (tmp_path / "t.csv").open("rb", buffering=0), 10)
    assert found is not None
    assert found.ends == (8, 18)
