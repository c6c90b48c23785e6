"""The text that a table lies in: its encoding, and what only all of its bytes tell, found on their way to a lexer."""

from __future__ import annotations

import codecs
import io
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from dermray.errors import CorpusError

# A quoted cell may span lines; a row must fit into one block.
BLOCK_BYTES = 32 << 20
# Longest first: the mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What .xlsx and .xls begin with: a zip archive, and Microsoft's container.
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
SAVE_AS_UTF8 = "save it again as UTF-8 (in Excel: File, Save As, 'CSV UTF-8 (Comma delimited)')"
SHOWN_CHARS = 80
# A letter beyond ASCII is none: in UTF-8 it takes several bytes, and other encodings are refused.
_SAID_SEPARATOR = re.compile(rb"sep=([^\r\n\x80-\xff])(?:\r\n|\n|\r|\Z)", re.IGNORECASE)
# Blocks that a lexer may read before what it makes of them is taken (Arrow's would read 32); and how long it must then
# have been waited for to get another one.
MAX_AHEAD = 4
PAUSE_S = 1.0

BatchT = TypeVar("BatchT")


class Text(io.RawIOBase):
    """A text without its mark and `sep=` line, looked at on its way to the lexer for what only all of it tells.

    Attributes:
        head: what it begins with, up to BLOCK_BYTES.
        said_separator: what Excel's `sep=;` line names.
        first_line: the number of the line that it begins with.
        is_utf8: whether all that has been looked at is.
        last_line: the number, from `first_line` = 1, of the last line looked at that is not empty.
    """

    def __init__(self, uri: str, file: io.BytesIO | io.RawIOBase) -> None:
        super().__init__()
        head = file.read(BLOCK_BYTES)
        if head.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS)):
            head += file.read()
        head = _as_utf8(uri, head)
        self.is_utf8, self._decoder = True, codecs.getincrementaldecoder("utf-8")()
        self._num_newlines, self._num_ends, self._has_quotes, self._last = 0, 0, False, b""
        self.head, self.said_separator, self.first_line = _said_separator(head)
        self._check_utf8(head[: len(head) - len(self.head)])
        self._file, self._place = file, 0
        self._is_paced, self._is_awaited, self._num_ahead = False, True, 0
        self._turn = threading.Condition()
        self._look(self.head)
        if len(head) < BLOCK_BYTES - len(codecs.BOM_UTF8):
            self._check_utf8(b"", final=True)

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as many as there are at once."""
        if self._place < len(self.head):
            begin = self._place
            self._place = len(self.head) if size < 0 else begin + size
            return self.head[begin : self._place]
        with self._turn:
            while self._is_paced and self._num_ahead >= MAX_AHEAD:
                if not self._turn.wait(PAUSE_S) and self._is_awaited:
                    # The lexer needs more than it should, as after a block of malformed rows alone.
                    break
            else:
                self._num_ahead += 1
        found = self._file.read(size)
        self._look(found)
        if not found:
            self._check_utf8(b"", final=True)
        return found

    def paced(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """What a lexer makes of the text, which it does not read much further than it is asked for."""
        self._is_paced = True
        try:
            for batch in batches:
                with self._turn:
                    self._is_awaited, self._num_ahead = False, max(0, self._num_ahead - 1)
                    self._turn.notify_all()
                yield batch
                self._is_awaited = True
        finally:
            self._is_paced = False

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def look_at_rest(self) -> None:
        """Read to the end."""
        self._place = len(self.head)
        while self.read(BLOCK_BYTES):
            pass

    def _check_utf8(self, data: bytes, *, final: bool = False) -> None:
        for begin in range(0, len(data) + 1, 1 << 20):
            if self.is_utf8:
                try:
                    self._decoder.decode(data[begin : begin + (1 << 20)], final=final)
                except UnicodeDecodeError:
                    self.is_utf8 = False

    def _look(self, data: bytes) -> None:
        self._check_utf8(data)
        self._has_quotes = self._has_quotes or b'"' in data
        newlines = data.count(b"\n")
        self._num_newlines += newlines
        self._num_ends += newlines
        if returns := data.count(b"\r"):
            self._num_ends += returns - data.count(b"\r\n")
        if self._last.endswith(b"\r") and data.startswith(b"\n"):
            self._num_ends -= 1
        end = len(data)
        while end and data[end - 1] in b"\r\n":
            end -= 1
        cut = data.rfind(b"\n", 0, end)
        if cut < 0:
            data, end = self._last + data, len(self._last) + end if end else len(self._last.rstrip(b"\r\n"))
            cut = data.rfind(b"\n", 0, end)
        self._last = data[cut + 1 :]

    @property
    def last_line(self) -> int:
        """Of the lines that are not empty."""
        return self._num_newlines - self._last.count(b"\n") + 1

    def spans_lines(self, num_rows: int) -> bool:
        """Whether any of so many rows holds the end of a line: quotation marks may have swallowed rows."""
        if not self._has_quotes:
            return False
        num_lines = self._num_ends + (not self._last.endswith((b"\n", b"\r")))
        # The last line may open a quotation mark that it does not close.
        return num_lines > num_rows + 1 or self._last.rstrip(b"\r\n").count(b'"') % 2 == 1


def _as_utf8(uri: str, data: bytes) -> bytes:
    """The text as UTF-8 without a mark, as far as the mark tells.

    Raises:
        CorpusError: it is not what its mark says, or no text.
    """
    if data.startswith(WORKBOOKS):
        raise CorpusError(
            f"{uri} is a workbook or an archive, not a table as text: open it and save its sheet as CSV "
            "(in Excel: File, Save As, 'CSV UTF-8 (Comma delimited)')"
        )
    if data.startswith(codecs.BOM_UTF8):
        data = data[len(codecs.BOM_UTF8) :]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if encoding is not None:
        try:
            data = data.decode(encoding).encode()
        except UnicodeError as error:
            raise CorpusError(f"{uri} begins as {encoding} and goes wrong: {one_line(error)}; {SAVE_AS_UTF8}") from None
    if b"\0" in data[:BLOCK_BYTES]:
        raise CorpusError(f"{uri} is no text, or UTF-16 without a byte order mark; {SAVE_AS_UTF8}")
    return data


def refuse_bytes(uri: str, open_file: Callable[[], io.BytesIO | io.RawIOBase]) -> NoReturn:
    """Say which byte of a file is not UTF-8. (Arrow would lose a malformed row with such a byte without a word.)"""
    with open_file() as file:
        data = _as_utf8(uri, file.read())
    try:
        data.decode()
    except UnicodeDecodeError as error:
        _refuse_byte(uri, data, error.start)
    raise CorpusError(f"{uri} has changed while it was read")


def _refuse_byte(uri: str, data: bytes, place: int) -> NoReturn:
    line = data.count(b"\n", 0, place) + 1
    begin = max(data.rfind(b"\n", 0, place) + 1, place - SHOWN_CHARS // 2)
    shown = data[begin : place + SHOWN_CHARS // 2].decode(errors="replace").splitlines()[0].strip()
    raise CorpusError(
        f"{uri} is not text in UTF-8: line {line} holds the byte 0x{data[place]:02X} ({shown!r}); {SAVE_AS_UTF8}"
    )


def _said_separator(data: bytes) -> tuple[bytes, str | None, int]:
    """The bytes below Excel's `sep=;` line, what it names, and the number of the line that they begin with."""
    said = _SAID_SEPARATOR.match(data)
    return (data[said.end() :], said[1].decode(), 2) if said else (data, None, 1)


def one_line(error: Exception) -> str:
    """What an error says, in a line."""
    return " ".join(str(error).split())
