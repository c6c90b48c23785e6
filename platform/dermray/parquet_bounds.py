"""Parquet files of others, refused where their footer says that they unpack to many times what they hold.

A page of zeros, or one value for millions of rows, packs ten-thousandfold: 70 kB of shard took 3 GB. What a footer
does not say is how often a long value of a dictionary is repeated: `unpacked_in_parts` goes by the values themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# What may be unpacked from however little: of a row group, and of a file that is read whole.
FREE_BYTES = 64 << 20
FREE_CELLS = 20_000_000
# Captions that repeat pack fiftyfold; a cell of a dictionary, or a missing one, takes a fraction of a byte.
MOST_TIMES = 200
MOST_CELLS_PER_BYTE = 64
_TO_DO = "copy the file again, or have its writer write it again"
# Of each column that is read bit by bit.
STREAM_BYTES = 1 << 20
# Pages of these are read as dictionaries; Arrow does not do so with others.
_DICTIONARIES = frozenset({"PLAIN_DICTIONARY", "RLE_DICTIONARY"})
DICTIONARY_ENCODINGS = _DICTIONARIES | {"PLAIN", "RLE", "BIT_PACKED"}
MOST_OF_A_DICTIONARY = 1 << 26


def require_bounded(metadata: pq.FileMetaData, *, whole: bool = False) -> None:
    """Refuse a file that should not be unpacked.

    Args:
        whole: all row groups are to be in memory at once, and count together.

    Raises:
        ArrowInvalid: a row group, or the file, is too much.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for some in [groups] if whole else [[group] for group in groups]:
        num_bytes = sum(group.total_byte_size for group in some)
        cells = sum(group.num_rows * group.num_columns for group in some)
        if num_bytes <= FREE_BYTES and cells <= FREE_CELLS:
            continue
        packed = sum(
            group.column(number).total_compressed_size for group in some for number in range(group.num_columns)
        )
        if num_bytes > max(FREE_BYTES, MOST_TIMES * packed) or cells > max(FREE_CELLS, MOST_CELLS_PER_BYTE * packed):
            raise pa.ArrowInvalid(
                f"{packed:,} bytes in it unpack to {num_bytes:,} in {cells:,} cells, too many times more to be unpacked"
            )


def opened(source: Any) -> pq.ParquetFile:
    """A file whose texts and bytes are read as dictionaries, so that a long one which repeats is in memory once.

    Args:
        source: what `pyarrow.parquet.ParquetFile` takes; it is read from while the result is.

    Raises:
        ArrowInvalid: it is damaged, or should not be unpacked.
    """
    metadata = pq.ParquetFile(source, page_checksum_verification=True).metadata
    require_bounded(metadata)
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=texts, page_checksum_verification=True)


def streamed(source: Any) -> pq.ParquetFile:
    """A file of which batches are unpacked one after the other (`iter_batches`), a page or so of each column at a time.

    Texts that the file holds as dictionaries come as such: `unpacked_in_parts`.

    Args:
        source: as `opened`.

    Raises:
        ArrowInvalid: it is damaged, should not be unpacked, all of its batches together, or as `require_rows`.
    """
    metadata = pq.ParquetFile(source, page_checksum_verification=True).metadata
    require_bounded(metadata, whole=True)
    require_rows(metadata)
    return pq.ParquetFile(
        source,
        metadata=metadata,
        read_dictionary=repeating_texts(metadata),
        buffer_size=STREAM_BYTES,
        page_checksum_verification=True,
    )


def require_rows(metadata: pq.FileMetaData) -> None:
    """Refuse a file whose footer does not agree with itself on how many rows there are.

    Raises:
        ArrowInvalid: the row groups' rows are not those of the file, or the values of a column those of its row group.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    if num_rows != metadata.num_rows:
        raise pa.ArrowInvalid(
            f"its footer says {metadata.num_rows:,} rows, and {num_rows:,} of its row groups together; {_TO_DO}"
        )
    plain = [place for place in range(metadata.num_columns) if not metadata.schema.column(place).max_repetition_level]
    for number, group in enumerate(groups):
        # Arrow leaves out the rows that are more than the footer says.
        if any(group.column(place).num_values != group.num_rows for place in plain):
            raise _wrong_rows(number, group.num_rows)


def batches(file: pq.ParquetFile, groups: Sequence[int], most: int) -> Iterator[pa.RecordBatch]:
    """The rows of row groups, at most `most` together, and no more or less of a group than its footer says.

    Raises:
        ArrowInvalid: there are, or they are damaged.
    """
    for group in groups:
        said, found = file.metadata.row_group(group).num_rows, 0
        # A group without rows need not lie anywhere.
        for batch in file.iter_batches(most, row_groups=[group], use_threads=False) if said else ():
            found += batch.num_rows
            if found > said:
                break
            yield batch
        if found != said:
            raise _wrong_rows(group, said)


def _wrong_rows(group: int, said: int) -> pa.ArrowInvalid:
    return pa.ArrowInvalid(f"row group {group} does not hold the {said:,} rows that its footer says; {_TO_DO}")


def repeating_texts(metadata: pq.FileMetaData) -> list[str]:
    """The columns of texts or bytes that a file holds as dictionaries, so that they may take little and unpack to much.

    Those that Arrow cannot read as dictionaries, because some pages are packed in yet another way, are left out; and
    so are those of which a row group holds much: Arrow keeps all values of a column that it reads as a dictionary.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    found = []
    for number in range(metadata.num_columns):
        chunks = [group.column(number) for group in groups]
        if (
            metadata.schema.column(number).physical_type == "BYTE_ARRAY"
            and any(not _DICTIONARIES.isdisjoint(chunk.encodings) for chunk in chunks)
            and all(DICTIONARY_ENCODINGS.issuperset(chunk.encodings) for chunk in chunks)
            and all(chunk.total_uncompressed_size <= MOST_OF_A_DICTIONARY for chunk in chunks)
        ):
            found.append(metadata.schema.column(number).path)
    return found


def unpacked_in_parts(batch: pa.RecordBatch, most_bytes: int) -> Iterator[pa.RecordBatch]:
    """The rows of a batch in parts whose dictionaries of texts unpack to `most_bytes` at most, or of one row."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and column.type.value_type in (pa.string(), pa.binary()):
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            sizes += pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    begin = 0
    while begin < batch.num_rows:
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + most_bytes, side="right")))
        yield batch.slice(begin, end - begin)
        begin = end


def read_table(source: Any, *, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole file, its page checksums verified.

    Args:
        source: what `pyarrow.parquet.ParquetFile` takes.
        columns: names; all without.

    Raises:
        ArrowInvalid: it is damaged, or should not be unpacked.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True)
    require_bounded(file.metadata, whole=True)
    return file.read(columns=None if columns is None else list(columns), use_threads=False)
