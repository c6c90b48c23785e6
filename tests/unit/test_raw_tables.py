"""The one reader of tables, over what spreadsheets and hands make of them; prepare and evaluate read alike."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.config import parse as parse_config
from dermray.errors import CorpusError
from dermray.evaluate import cases
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tables import MALFORMED, Layout
from dermray.evaluate.tables import RawTable as EvaluationTable
from dermray.prepare import pipeline
from dermray.prepare.settings import PrepareConfig
from dermray.raw import tables, text
from dermray.raw.sources import READERS, SourceRequest
from dermray.raw.splits import others, split_name, split_of_file, told_of_others
from dermray.raw.tables import parse, parse_text

LAYOUT = Layout(
    image=("image",), label=("label",), caption=("caption",), split=("split",), optional=frozenset({"split"})
)
SINK = io.BytesIO()
pq.write_table(pa.table({"image": ["a.png"], "label": ["nevus"]}), SINK)
PARQUET = SINK.getvalue()
ROWS = [{"image": f"{number}.png", "label": "nævus", "caption": "a, b; c"} for number in range(3)]


def written(delimiter: str = ",", header: str = "image,label,caption") -> str:
    stream = io.StringIO()
    stream.write(header.replace(",", delimiter) + "\n")
    csv.writer(stream, delimiter=delimiter, lineterminator="\n").writerows(row.values() for row in ROWS)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(written().encode(), id="utf-8"),
        pytest.param(written().encode("utf-8-sig"), id="utf-8 with mark"),
        pytest.param(written().encode("utf-16"), id="utf-16"),
        pytest.param(b"\xfe\xff" + written().encode("utf-16-be"), id="utf-16 big endian"),
        pytest.param(written().encode("utf-32"), id="utf-32"),
        pytest.param(written(";").encode("utf-16"), id="utf-16 with semicolons"),
        pytest.param(written("\t").encode(), id="tabs"),
        pytest.param(written("|").encode(), id="bars"),
        pytest.param(b"sep=;\r\n" + written(";").replace("\n", "\r\n").encode(), id="sep line"),
        pytest.param(written(header=" image ,label , caption").encode(), id="blanks in the header"),
        pytest.param(written().replace("\n", ",,\n").encode(), id="nameless empty columns"),
        pytest.param(written().replace("\n", "\r").encode(), id="old Macintosh"),
        pytest.param(f"sep=;\n{written(';')}".replace("\n", "\r").encode(), id="sep line of an old Macintosh"),
    ],
)
def test_spreadsheets_are_read_as_meant(content: bytes) -> None:
    read = parse("table.csv", content)
    assert read.table.to_pylist() == ROWS
    assert read.rows.to_pylist() == [1, 2, 3]
    assert not read.dropped


def opened(row: int, last: bool = True) -> bytes:
    """200 rows, of which one opens a quotation mark that nothing closes."""
    rows = [f"{number}.png,nevus,fine" if last else f"{number}.png,fine,nevus" for number in range(1, 201)]
    rows[row - 1] = f'{row}.png,nevus,"papule of 3 mm' if last else f'{row}.png,"papule of 3 mm,nevus'
    return ("image,label,caption\n" + "\n".join(rows) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written().encode("cp1252"), "line 2 holds the byte 0xE6 .*CSV UTF-8"),
        ("image,næme\na,b\n".encode("cp1252"), "line 1 holds the byte 0xE6 .*CSV UTF-8"),
        ("sep=§\nimage§label\na§b\n".encode("cp1252"), "line 1 holds the byte 0xA7 .*CSV UTF-8"),
        (written().encode("utf-16-le"), "UTF-16 without a byte order mark.*CSV UTF-8"),
        (b"\xff\xfe\x00\xd8", "goes wrong"),
        (b"a;b|c\n1;2|3\n", "may be separated by ';' and '|'"),
        (b"image, image\n1,2\n", "repeats the column 'image'"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08", "is a workbook or an archive, .*CSV UTF-8"),
        (b"", "is empty"),
        (b" , \n1,2\n", "is empty"),
        (b"image,label\n", "no rows below its header"),
        (opened(151), "begins in line 152 .* goes on to line 201"),
        (opened(151, last=False), "begins in line 152 .* goes on to line 201"),
        (opened(151).replace(b"171.png,nevus,fine", b'171.png,nevus,"fine, too"'), "begins in line 152"),
        (opened(200).rstrip(b"\n"), "line 201, the last one, opens a quotation mark"),
        (b"sep=,\n" + opened(151), "begins in line 153"),
    ],
)
def test_what_is_not_certain_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        parse("table.csv", content)


def test_quotation_marks_that_mean_themselves_are_read() -> None:
    content = b'image,label,caption\n1.png,5" wide,"two\nlines, and ""more"""\n2.png,"x",y\n'
    assert parse("table.csv", content).table.to_pylist() == [
        {"image": "1.png", "label": '5" wide', "caption": 'two\nlines, and "more"'},
        {"image": "2.png", "label": "x", "caption": "y"},
    ]
    # The last one goes on behind its closed mark.
    last = parse("table.csv", content + b'3.png,"Atypical" nevus,z\n').table.to_pylist()[-1]
    assert last == {"image": "3.png", "label": "Atypical nevus", "caption": "z"}


def test_a_nameless_column_with_values_is_kept(tmp_path: Path) -> None:
    assert parse("table.csv", b",image\n7,a.png\n").table.to_pylist() == [{"column 1": "7", "image": "a.png"}]
    table = pa.table({" image ": ["a.png", None], "": ["7", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    read = parse("t.parquet", (tmp_path / "t.parquet").read_bytes())
    assert read.table.to_pylist() == [{"image": "a.png", "column 2": "7"}, {"image": "", "column 2": ""}]


def test_prepare_and_evaluate_tell_the_same_rows(tmp_path: Path) -> None:
    rows = ["a.png,nevus,x,Test", "b.png,nevus", "c.png,nevus,x,TEST", "d.png,nevus,x,test,more", "e.png,nevus,x,train"]
    table = tmp_path / "metadata.csv"
    table.write_text("image,label,caption,split\n" + "\n".join(rows) + "\n")
    (tmp_path / "a.png").touch()
    prepared = READERS["csv"](SourceRequest(str(tmp_path)))
    assert [row.row for row in prepared.dropped] == [2, 4]
    assert prepared.num_rows == len(rows)
    scored = EvaluationTable.read(str(table), LAYOUT)
    assert scored.splits == {"test": 2, "train": 1}
    samples = scored.samples("Test")
    assert (samples.ids, samples.dropped) == (["a.png", "c.png"], {MALFORMED: 2})


@pytest.mark.parametrize(
    ("split", "written"),
    [
        ("train", "Train| TRAIN|training|trn|train set|Training_Set|train-split|training data"),
        ("val", "Val|VALID|Validation|dev|Development|validation set|valset"),
        ("test", "Test| TEST |tests|testing|tst|test_set"),
        ("holdout", "holdout|Holdout"),
        ("data", "data"),
    ],
)
def test_splits_have_one_name(split: str, written: str) -> None:
    assert {split_name(each) for each in written.split("|")} == {split}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00004.parquet", "train"),
        ("data/validation-00000-of-00004.parquet", "val"),
        ("holdout-00000-of-00002.parquet", "holdout"),
        ("part-00000-of-00002.parquet", None),
        ("val/part-00000-of-00002.parquet", "val"),
        ("test/00003.tar", "test"),
        ("training_set/a/00003.tar", "train"),
        ("dev-000.tar", "val"),
        ("testicle.tar", None),
    ],
)
def test_splits_of_files(path: str, split: str | None) -> None:
    assert split_of_file(path) == split


def test_splits_of_other_names_are_told() -> None:
    assert list(told_of_others(others({"train": 3, "": 1, "mine": 2}, expected=["mine"]))) == []
    assert list(told_of_others(others({"train": 3, "fold1": 2, "a\nb": 4}))) == [
        "6 rows are in splits that are none of train, val and test, and stay so: 'a\\nb' (4), 'fold1' (2)"
    ]


def test_prepare_and_evaluate_read_splits_alike_and_tell_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["Training", "TRAIN", "dev", "Validation", "tests", "Test ", "nan", "holdout"]
    table = tmp_path / "metadata.csv"
    rows = [f"{number}.png,nevus,x,{split}" for number, split in enumerate(said)]
    table.write_text("\n".join(["image,label,caption,split", *rows, ""]))
    (tmp_path / "0.png").touch()
    keys = ["source=csv", f"input={tmp_path}", f"output={tmp_path}/out", "split.val=0"]
    work = pipeline.look(parse_config(PrepareConfig, keys))
    line = "1 rows are in splits that are none of train, val and test, and stay so: 'holdout' (1)"
    assert line in capsys.readouterr().out
    planned = {spec.split: spec.rows.num_rows for spec in work.plan.shards}
    assert planned == {"train": 3, "val": 2, "test": 2, "holdout": 1}
    scored = EvaluationTable.read(str(table), LAYOUT)
    assert scored.splits == {"train": 2, "val": 2, "test": 2, "": 1, "holdout": 1}
    case = cases.of_config(parse_config(EvaluateConfig, ["model=m", f"data={table}", f"output={tmp_path}/report"]))
    assert (case.samples.split, len(case.samples.ids), case.told) == ("test", 2, (f"{table}: {line}",))
    assert case.validation is not None


@given(st.lists(st.lists(st.text("ab\n\",;'\u00e4 ", max_size=6), min_size=2, max_size=2), min_size=1, max_size=12))
def test_whatever_a_writer_of_csv_writes_comes_back(rows: list[list[str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["image", "caption"], *rows])
    read = parse("table.csv", stream.getvalue().encode())
    assert [list(row.values()) for row in read.table.to_pylist()] == rows


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_one_refusal(data: bytes) -> None:
    for name, content in (
        ("table.csv", b"image,label\n" + data),
        ("table.parquet", PARQUET[:-20] + data + PARQUET[-20:]),
    ):
        try:
            read = parse(name, content)
        except CorpusError as error:
            refusal = str(error)
            assert "\n" not in refusal.strip()
        else:
            assert read.num_rows == len(read.rows) + len(read.dropped) > 0


@pytest.mark.parametrize("names", [[f"c{number}" for number in range(300_000)], [""] * 300_000], ids=["named", "blank"])
def test_a_header_of_very_many_columns_is_refused_at_once(names: list[str]) -> None:
    # Comparing each name with every other one would take minutes: the suite's limit of time is the assertion.
    data = (",".join(names) + "\n" + ",".join("1" for _ in names) + "\n").encode()
    with pytest.raises(CorpusError, match=r"wide.csv has 300,000 columns, and a table may have 10,000"):
        parse("wide.csv", data)


cells = st.sampled_from(["x", "", " ", "é", 'say "hi"', "a,b", "two\nlines", "12"])
lines = st.lists(
    st.one_of(st.lists(cells, min_size=3, max_size=3), st.lists(cells, min_size=2, max_size=4)), max_size=40
)


@settings(max_examples=40)
@given(
    lines, st.sampled_from(["a,b,c", "a,,c"]), st.sampled_from(["\n", "\r\n"]), st.sampled_from([b"", b'"', b"\xe2"])
)
def test_a_long_table_is_read_in_blocks_as_a_short_one_is(
    rows: list[list[str]], header: str, newline: str, last: bytes
) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator=newline).writerows(rows)
    data = (header + newline + stream.getvalue()).encode() + last

    def outcome() -> tuple[object, ...]:
        try:
            read = parse("table.csv", data)
        except CorpusError as error:
            return (str(error),)
        return read.table.to_pydict(), read.rows.to_pylist(), read.dropped

    expected = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_BYTES", 150)
        patch.setattr(tables, "MAX_ROWS", 3)
        patch.setattr(text, "BLOCK_BYTES", 400)
        patch.setattr(text, "PAUSE_S", 0.001)
        assert outcome() == expected


def test_what_reads_a_table_in_blocks_may_stop_and_has_rows_with_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (tables, text):
        monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    rows = [f"{number}.png,{number}" if number % 10 else "malformed" for number in range(1, 201)]
    data = "\n".join(["image,label", *rows]).encode()
    blocks = list(parse_text("table.csv", lambda: io.BytesIO(data)))
    assert len(blocks) > 10
    assert [number for block in blocks for number in block.rows.to_pylist()] == [n for n in range(1, 201) if n % 10]
    assert all(block["label"].to_pylist() == [str(number) for number in block.rows.to_pylist()] for block in blocks)
    assert [row.row for block in blocks for row in block.dropped] == list(range(10, 201, 10))
    assert next(parse_text("table.csv", lambda: io.BytesIO(data))).rows[0].as_py() == 1


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_large_row_group_is_never_in_memory_whole(dictionary: bool, tmp_path: Path) -> None:
    texts = pa.array([f"{number:08d}" + "x" * 600 for number in range(200_000)])
    pq.write_table(pa.table({"a": texts}), tmp_path / "t.parquet", compression="none", use_dictionary=dictionary)
    before, held, read = pa.total_allocated_bytes(), 0, 0
    with (tmp_path / "t.parquet").open("rb", buffering=0) as file:
        for block in tables.parse_parquet("t.parquet", file):
            held = max(held, pa.total_allocated_bytes() - before)
            read += block["a"].nbytes
    # A block of 10 MB as it is unpacked and as cells, and the one before it.
    assert held < read / 3, (held, read)
