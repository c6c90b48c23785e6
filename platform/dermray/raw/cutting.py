"""A long table of text cut into pieces at the ends of rows, so that many readers can read it side by side.

    header │ rows rows rows ▏ rows rows rows ▏ rows rows        each piece: the header again, its rows, a row of marks

A newline may also stand inside a cell in quotation marks. Where a piece begins at the beginning of a row, and a reader
of it gives the row of marks behind it as its last row, the piece has ended with the end of a row, and the next one
begins at the beginning of one. So when all pieces say so, they hold the rows that one reader of the whole table gives.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple, Protocol

from dermray.errors import CorpusError, StorageError
from dermray.raw.opened import Digested, changed_ns, require_unchanged
from dermray.raw.tables import StringTable, columns_of, parse_text
from dermray.raw.text import BYTE_ORDER_MARKS, Text

MARK = "end of this piece"


class Piece(Protocol):
    """Some rows of a table, as they come to a reader."""

    def blocks(self) -> Iterator[StringTable]:
        """They in blocks, one at least, numbered from 1.

        Raises:
            CorpusError: perhaps after some blocks, the piece cannot be read by itself. One reader of the whole table
                says what is wrong, if anything is.
        """
        ...


@dataclass(frozen=True)
class CutTable:
    """A table that is cut.

    Attributes:
        uri: of the table.
        names: of its columns, as they are written.
        file: in which its pieces lie, read to its end.
        since_ns: when the file was last changed.
    """

    uri: str
    names: tuple[str, ...]
    file: Digested
    since_ns: int

    def pieces(self) -> Sequence[Any]:
        """All of them, in order; each, pickled, is a `Piece`."""
        raise NotImplementedError

    def require_unchanged(self) -> None:
        """Check that the pieces are of the bytes that were read before.

        Raises:
            CorpusError: somebody has written into the file meanwhile.
        """
        require_unchanged(self.uri, self.file, self.since_ns)

    def bytes_between(self, begin: int, end: int) -> bytes:
        """Some of the file.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            return os.pread(self.file.fileno(), end - begin, begin)
        except OSError as error:
            raise StorageError(f"{self.uri}: {' '.join(str(error).split())}") from None


class Columns(NamedTuple):
    """What a piece below the header must be told to be read: the separator of cells, and the names of columns."""

    separator: str
    names: tuple[str, ...]

    def line(self, cells: Sequence[str]) -> bytes:
        """A row as it is written."""
        text = io.StringIO()
        csv.writer(text, delimiter=self.separator, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()


@dataclass(frozen=True)
class TextPiece:
    """Some rows of a table, as they are written.

    Attributes:
        uri: of the table.
        columns: of the table.
        has_header: whether the table's own header stands above them.
        text: all that.
    """

    uri: str
    columns: Columns
    has_header: bool
    text: bytes

    def blocks(self) -> Iterator[StringTable]:
        """As `Piece.blocks`."""
        mark = MARK
        while mark.encode() in self.text:
            mark += "."
        text = self._between(mark)
        held: StringTable | None = None
        for block in parse_text(self.uri, lambda: io.BytesIO(text)):
            if held:
                yield held
            held = block
        if held is None or not held.table.num_rows or any(column[-1].as_py() != mark for column in held.table.columns):
            raise CorpusError(f"{self.uri}: a piece of it does not end with a row")
        yield replace(held, table=held.table.slice(0, held.table.num_rows - 1), rows=held.rows[:-1])

    def _between(self, mark: str) -> bytes:
        """The piece as a table of its own, with a row of marks at its end."""
        said = f"sep={self.columns.separator}\n".encode()
        header = b"" if self.has_header else self.columns.line(self.columns.names)
        end = b"" if self.text.endswith((b"\n", b"\r")) else b"\n"
        return b"".join((said, header, self.text, end, self.columns.line([mark] * len(self.columns.names))))


@dataclass(frozen=True)
class Placed:
    """A piece where it lies in its file; pickled, it is that `TextPiece`."""

    table: CutText
    begin: int
    end: int

    def __reduce__(self) -> tuple[Any, ...]:
        has_header, text = self.begin == self.table.skipped, self.table.bytes_between(self.begin, self.end)
        return TextPiece, (self.table.uri, self.table.columns, has_header, text)


@dataclass(frozen=True)
class CutText(CutTable):
    """A table of text that is cut.

    Attributes:
        separator: of its cells.
        skipped: bytes of the file before the header: a mark, Excel's line that names the separator.
        ends: where in the file the pieces end.
    """

    separator: str
    skipped: int
    ends: tuple[int, ...]

    @property
    def columns(self) -> Columns:
        """What a piece must be told of them."""
        return Columns(self.separator, self.names)

    def pieces(self) -> list[Placed]:
        """As `CutTable.pieces`."""
        return [Placed(self, *ends) for ends in itertools.pairwise((self.skipped, *self.ends))]


def cut(uri: str, file: BinaryIO, piece_bytes: int) -> CutText | None:
    """A table of text cut into pieces; None where only one reader of the whole can tell its rows or columns.

    That is a table in another encoding than UTF-8, with a column without a name, with a row longer than a piece, or
    whose last line has an odd number of quotation marks.

    Args:
        uri: where it is from.
        file: a local one, at its beginning.
        piece_bytes: bytes of a piece, less some rows.

    Raises:
        CorpusError: its header is not one.
        OSError: it cannot be read.
    """
    since_ns = changed_ns(file)
    if os.pread(file.fileno(), 4, 0).startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS)):
        return None
    digested = Digested(file)
    text = Text(uri, digested)
    skipped = digested.num_bytes - len(text.head)
    separator, names = columns_of(uri, text)
    ends = _ends(itertools.chain([text.head], iter(lambda: digested.read(piece_bytes), b"")), piece_bytes)
    if ends is None or not all(name.strip() for name in names):
        return None
    places = tuple(skipped + end for end in ends)
    return CutText(uri, tuple(names), digested, since_ns, separator, skipped, places)


def _ends(parts: Iterable[bytes], piece_bytes: int) -> list[int] | None:
    """Where to cut the text that comes in parts; None where that cannot be told.

    With pieces of 10 bytes `a,b\\n1,2\\n"\\n",4\\n5,6\\n` is cut at 8, since the newline after that is between two
    quotation marks, and at its end, 18.
    """
    ends = [0]
    before, held = b"", b""
    for part in parts:
        held += part
        while len(held) >= piece_bytes:
            end = _row_end(held[:piece_bytes])
            if not end:
                return None
            ends.append(ends[-1] + end)
            before, held = held[:end], held[end:]
    last_line = (before + held).rstrip(b"\r\n").rpartition(b"\n")[2]
    if last_line.count(b'"') % 2 == 1:
        return None
    return ends[1:] if not held else [*ends[1:], ends[-1] + len(held)]


def _row_end(text: bytes) -> int:
    """Behind the last newline with an even number of quotation marks before it; 0 where there is none."""
    end, num_marks = len(text), text.count(b'"')
    while (newline := text.rfind(b"\n", 0, end)) >= 0:
        num_marks -= text.count(b'"', newline, end)
        if num_marks % 2 == 0:
            return newline + 1
        end = newline
    return 0
