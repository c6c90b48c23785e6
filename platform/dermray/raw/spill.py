"""Rows too many for memory: written block by block into a file without a name, and read as one Arrow table.

Nobody sees the difference: the table lies in pages of the file that the system reads when they are touched and takes
back when it needs the memory. The file is gone when the last that was read of it is, also if the process is killed.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa

from dermray.errors import StorageError

# Rows that are looked at together: what their cells come to as objects of Python.
BLOCK_ROWS = 65_536
# Tables that come to no more stay in memory.
MAX_HELD_BYTES = 64 << 20

_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class Spilled:
    """Tables that were written one after the other, each as one block."""

    def __init__(self, file: BinaryIO) -> None:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _MAPPED.add(mapped)
        self._reader = pa.ipc.open_file(pa.py_buffer(mapped))

    def block(self, number: int) -> pa.Table:
        """One of them, from 0."""
        return pa.Table.from_batches([self._reader.get_batch(number)])

    def table(self) -> pa.Table:
        """All of them as one table, a chunk each."""
        return self._reader.read_all()


class Spill:
    """Takes tables of one schema that have rows.

    Raises:
        StorageError: the disk is full or fails.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="dermray-")  # noqa: SIM115 -- `done` closes it
        self._writer = pa.ipc.new_file(self._file, schema)

    def append(self, table: pa.Table) -> None:
        """Write a table as one block."""
        (block,) = table.combine_chunks().to_batches()
        try:
            self._writer.write_batch(block)
        except OSError as error:
            raise _full(error) from None

    def done(self) -> Spilled:
        """What was written; nothing can be written any more."""
        try:
            self._writer.close()
            self._file.flush()
        except OSError as error:
            raise _full(error) from None
        with self._file:
            return Spilled(self._file)


def _full(error: OSError) -> StorageError:
    return StorageError(f"{tempfile.gettempdir()}: {error}; the table is put down there: TMPDIR names another folder")


def collected(tables: Iterable[pa.Table], schema: pa.Schema, *, max_held_bytes: int = MAX_HELD_BYTES) -> pa.Table:
    """Tables of one schema as one: in memory and of one chunk if they come to little, else spilled, a chunk each.

    Raises:
        StorageError: the disk is full or fails.
    """
    held: list[pa.Table] = []
    num_bytes = 0
    spill: Spill | None = None
    for table in tables:
        if not table.num_rows:
            continue
        num_bytes += table.nbytes
        held.append(table)
        if num_bytes > max_held_bytes:
            spill = spill or Spill(schema)
            for each in held:
                spill.append(each)
            held.clear()
    if spill is None:
        return pa.concat_tables(held or [schema.empty_table()]).combine_chunks()
    for each in held:
        spill.append(each)
    return spill.done().table()


class Growing:
    """Tables of several schemas taken in one after the other, columns that one lacks being null there.

    Raises:
        StorageError: the disk is full or fails.
    """

    def __init__(self) -> None:
        self._down: list[pa.Table] = []
        self._held: list[pa.Table] = []

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._down or self._held)

    def append(self, table: pa.Table) -> None:
        """Take one in; what has come to much is put down."""
        self._held.append(table)
        if sum(each.nbytes for each in self._held) > MAX_HELD_BYTES:
            joined = pa.concat_tables(self._held, promote_options="default")
            self._down.append(collected(blocks(joined), joined.schema, max_held_bytes=0))
            self._held.clear()

    def table(self) -> pa.Table:
        """All of them."""
        return pa.concat_tables([*self._down, *self._held], promote_options="default")


def blocks(table: pa.Table, max_rows: int = BLOCK_ROWS) -> Iterator[pa.Table]:
    """A table in blocks of rows, of one chunk each; what was read of spilled tables leaves memory block by block."""
    for batch in table.to_batches(max_chunksize=max_rows):
        yield pa.Table.from_batches([batch])
        let_go()


def placed(table: pa.Table, max_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, pa.Table]]:
    """The blocks of a table, each with the places of its rows."""
    end = 0
    for block in blocks(table, max_rows):
        yield slice(end, end := end + block.num_rows), block


def let_go() -> None:
    """Have the system take back what was read of spilled tables: it is in their files, and comes again when touched."""
    for mapped in list(_MAPPED):
        mapped.madvise(mmap.MADV_DONTNEED)
