"""A long table read in pieces by tasks: the same rows, drops, counts and errors as one reader gives."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.errors import CorpusError, StorageError
from dermray.raw import cutting, cutting_parquet
from dermray.raw import tables as raw_tables
from dermray.raw.cutting import cut
from dermray.raw.opened import open_once
from dermray.raw.sources import READERS, SourceRequest, interpreting, tables
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


def as_parquet(table: Path, text: bytes) -> Path:
    """A table of text as one of Parquet, row groups large, small and without rows, in place of it."""
    rows = pa.Table.from_pylist(list(csv.DictReader(io.StringIO(text.decode(), newline=""))))
    rows = rows.select([name for name in rows.column_names if name])
    table.unlink()
    file = table.with_name("t.parquet")
    with pq.ParquetWriter(file, rows.schema, compression="none", write_page_checksum=True) as writer:
        for begin, end in (
            (0, 0),
            (0, 7),
            (7, 9),
            (9, 9),
            (9, 9),
            (9, 30),
            (30, 31),
            (31, 150),
            (150, NUM_ROWS),
            (9, 9),
        ):
            writer.write_table(rows.slice(begin, end - begin))
    return file


def test_pieces_of_a_parquet_table_hold_its_rows(source: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_parquet(table, long_table(table))
    one = outcome(source, table.parent, SourceRequest("", file.name))
    assert [row["row"] for row in one["table"]] == list(range(1, NUM_ROWS + 1))
    in_small_pieces(monkeypatch, 1 << 20, 20)
    told = Told()
    assert outcome(source, table.parent, SourceRequest("", file.name, tasks=told)) == one
    # Of 119 rows the fifth is too large.
    assert [found.num_rows for found in reversed(told.done)] == [7 + 2, 21, 1, *[20] * 5, 19, 50]
    damaged = bytearray(file.read_bytes())
    place = damaged.index(b"images/0100.png")
    damaged[place] ^= 1
    file.write_bytes(damaged)
    errors = []
    for tasks in (None, backwards):
        with pytest.raises(CorpusError, match=r"t\.parquet is not a Parquet table of plain columns: ") as error:
            outcome(source, table.parent, SourceRequest("", file.name, tasks=tasks))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def repeated(file: Path, num_chars: int, group_rows: int = NUM_ROWS) -> None:
    """A Parquet table of one long caption for all rows, which it holds once."""
    names = [f"{number:04d}.png" for number in range(NUM_ROWS)]
    table = pa.table({"image": names, "caption": ["x" * num_chars] * NUM_ROWS})
    pq.write_table(table, file, row_group_size=group_rows, write_statistics=False)


def test_a_piece_that_unpacks_to_too_much_is_left_to_the_one_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated(tmp_path / "t.parquet", 4000, NUM_ROWS // 2)
    one = outcome("csv", tmp_path, SourceRequest("", "t.parquet"))
    in_small_pieces(monkeypatch, 1 << 20, NUM_ROWS // 2)
    told = Told()
    assert outcome("csv", tmp_path, SourceRequest("", "t.parquet", tasks=told)) == one
    assert [found.num_rows for found in told.done] == [NUM_ROWS // 2] * 2
    monkeypatch.setattr(interpreting, "MAX_PIECE_BYTES", 100_000)
    for each in (SourceRequest("", "t.parquet"), SourceRequest("", "t.parquet", tasks=told)):
        assert outcome("csv", tmp_path, each) == one
    assert told.done[2:] == [None]


def test_a_short_parquet_table_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(tmp_path / "t.parquet", 10)
    fetched: list[str] = []

    def fetching(uri: str, *, max_bytes: int) -> Any:
        fetched.append(uri)
        return open_once(uri, max_bytes=max_bytes)

    monkeypatch.setattr(tables, "open_once", fetching)
    found = outcome("csv", tmp_path, SourceRequest("", "t.parquet", tasks=backwards))
    assert len(found["table"]) == NUM_ROWS
    assert fetched == [str(tmp_path / "t.parquet")]


def test_what_arrow_cannot_put_together_is_left_to_the_one_reader(tmp_path: Path) -> None:
    repeated(tmp_path / "t.parquet", 10)
    blocks = list(raw_tables.parse_parquet("t.parquet", (tmp_path / "t.parquet").open("rb")))

    def overflowing(block: Any, findings: Any) -> Any:
        raise pa.ArrowInvalid("offset overflow while concatenating arrays")

    class Piece:
        def blocks(self) -> Iterator[Any]:
            return iter(blocks)

    assert interpreting._Reader(overflowing)(Piece()) is None


def test_a_block_is_bounded_by_what_it_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(tmp_path / "t.parquet", 4000, 7)
    monkeypatch.setattr(raw_tables, "BLOCK_BYTES", 100_000)
    with (tmp_path / "t.parquet").open("rb") as file:
        blocks = list(raw_tables.parse_parquet("t.parquet", file))
    assert max(block.table.nbytes for block in blocks) <= 100_000
    assert min(block.table.num_rows for block in blocks[:-1]) > 14, "small row groups are not put together"
    assert [row for block in blocks for row in block.rows.to_pylist()] == list(range(1, NUM_ROWS + 1))
    assert {text for block in blocks for text in block["caption"].to_pylist()} == {"x" * 4000}


def with_rows(data: bytes, group: int | None, said: int) -> bytes:
    """A Parquet file whose footer says another number of rows of a row group, or of all."""

    def rows(metadata: pq.FileMetaData) -> list[int]:
        return [metadata.num_rows, *(metadata.row_group(each).num_rows for each in range(metadata.num_row_groups))]

    wanted = rows(pq.read_metadata(io.BytesIO(data)))
    place = 0 if group is None else group + 1
    # Thrift writes a small number twice as large, seven bits a byte.
    old = bytes([wanted[place] * 2 & 127 | 128, wanted[place] >> 6])
    wanted[place] = said
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    while (at := data.find(old, at + 1)) >= 0:
        other = data[:at] + bytes([said * 2 & 127 | 128, said >> 6]) + data[at + 2 :]
        with contextlib.suppress(pa.ArrowException, OSError):
            metadata = pq.read_metadata(io.BytesIO(other))
            values = {metadata.row_group(1).column(each).num_values for each in range(metadata.num_columns)}
            if rows(metadata) == wanted and values == {101}:
                return other
    raise AssertionError("the number is not in the footer")


@pytest.mark.parametrize("rows_of_piece", [10, 90, 500], ids=["unpacked here", "as it lies", "together"])
@pytest.mark.parametrize(
    ("group", "said", "message"),
    [
        (None, 301, "its footer says 301 rows, and 299 of its row groups together"),
        (1, 99, "its footer says 299 rows, and 297 of its row groups together"),
        ((1, -2), 99, "row group 1 does not hold the 99 rows that its footer says"),
        ((1, 7), 108, "row group 1 does not hold the 108 rows that its footer says"),
        ((1, -101), 0, "row group 1 does not hold the 0 rows that its footer says"),
    ],
)
def test_a_footer_that_counts_other_rows_is_the_same_error(
    group: Any, said: int, message: str, rows_of_piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group of other rows than the footer says, alone or with the number of all rows to fit it."""
    file = tmp_path / "t.parquet"
    schema = pa.schema([("image", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        for num_rows in (98, 101, 100):
            names = [f"{num_rows}-{number}.png" for number in range(num_rows)]
            writer.write_table(pa.table({"image": names, "caption": names}, schema=schema))
    data, more = file.read_bytes(), 0
    if isinstance(group, tuple):
        group, more = group
        data = with_rows(data, None, 299 + more)
    file.write_bytes(with_rows(data, group, said))
    in_small_pieces(monkeypatch, 1 << 20, rows_of_piece)
    for tasks in (None, backwards):
        with pytest.raises(CorpusError) as error:
            outcome("csv", tmp_path, SourceRequest("", "t.parquet", tasks=tasks))
        told = f"{file} is not a Parquet table of plain columns: {message}"
        assert str(error.value) == f"{told}; copy the file again, or have its writer write it again"


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_a_table_that_changes_meanwhile_is_refused(
    kind: str, source: str, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.write_bytes(long_table(table))
    if kind == "parquet":
        table = as_parquet(table, table.read_bytes())
    in_small_pieces(monkeypatch, 2048)
    request = SourceRequest("", table.name if kind == "parquet" else None)

    def meddling(pieces: Mapping[str, Any], work: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        table.write_bytes(table.read_bytes())
        return backwards(pieces, work)

    with pytest.raises(CorpusError, match="has changed while it was read"):
        outcome(source, table.parent, replace(request, tasks=meddling))
    monkeypatch.setattr(cutting.os, "pread", failing)
    with pytest.raises(StorageError, match=f"^{table}: .*Input/output error"):
        outcome(source, table.parent, replace(request, tasks=backwards))


def failing(*_: int) -> bytes:
    raise OSError(5, "Input/output error")


def cells(names: list[str], num_rows: int) -> st.SearchStrategy[pa.Table]:
    """Columns that a Parquet table of our own may have: texts that repeat or not, nulls, numbers, truth values."""
    kinds = [
        st.lists(st.sampled_from(["", "nan", "naevus", "a, b", "x" * 300, None]), min_size=num_rows, max_size=num_rows),
        st.lists(st.none() | st.integers(-3, 99), min_size=num_rows, max_size=num_rows),
        st.lists(st.none() | st.booleans(), min_size=num_rows, max_size=num_rows),
        st.lists(st.none() | st.sampled_from([0.5, 1e300]), min_size=num_rows, max_size=num_rows),
    ]
    return st.tuples(*(st.one_of(*kinds) for _ in names)).map(
        lambda columns: pa.table(
            [pa.array([f"{n}.png" for n in range(num_rows)]), *map(pa.array, columns)], names=["image", *names]
        )
    )


@settings(max_examples=20, deadline=None)
@given(
    table=st.integers(1, 40).flatmap(lambda n: cells(["caption", "label", "age", "site"], n)),
    group_rows=st.integers(1, 50),
    size=st.tuples(st.integers(100, 3000), st.integers(3, 40)),
    footer_bytes=st.sampled_from([0, cutting_parquet.MAX_FOOTER_BYTES]),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["none", "snappy"]),
            "use_dictionary": st.booleans(),
            "data_page_size": st.just(64),
        }
    ),
)
def test_any_cutting_of_a_parquet_table_gives_its_rows(
    table: pa.Table, group_rows: int, size: tuple[int, int], footer_bytes: int, options: dict[str, Any]
) -> None:
    columns = Columns(modality="site")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        pq.write_table(table, Path(folder) / "t.parquet", row_group_size=group_rows, **options)
        one = outcome("csv", Path(folder), SourceRequest("", "t.parquet", columns))
        assert [row["row"] for row in one["table"]] == list(range(1, len(table) + 1))
        assert one["met"].total() == len(table)
        in_small_pieces(patch, *size)
        patch.setattr(cutting_parquet, "MAX_FOOTER_BYTES", footer_bytes)
        told = Told()
        assert outcome("csv", Path(folder), SourceRequest("", "t.parquet", columns, tasks=told)) == one
        assert told.done
        assert None not in told.done
        assert max(found.num_rows for found in told.done) <= max(size[1], min(group_rows, size[1] * 4))


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
