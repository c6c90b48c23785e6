"""Parquet files of others, refused where their footer says that they unpack to many times what they hold.

A page of zeros, or one value for millions of rows, packs ten-thousandfold: 70 kB of shard took 3 GB. What a footer
does not say, such as how often a long value of a dictionary is repeated, is not seen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What may be unpacked from however little: of a row group, and of a file that is read whole.
FREE_BYTES = 64 << 20
FREE_CELLS = 20_000_000
# Captions that repeat pack fiftyfold; a cell of a dictionary, or a missing one, takes a fraction of a byte.
MOST_TIMES = 200
MOST_CELLS_PER_BYTE = 64
# Of each column that is read bit by bit.
STREAM_BYTES = 1 << 20


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

    Args:
        source: as `opened`.

    Raises:
        ArrowInvalid: it is damaged, or should not be unpacked, all of its batches together.
    """
    file = pq.ParquetFile(source, buffer_size=STREAM_BYTES, page_checksum_verification=True)
    require_bounded(file.metadata, whole=True)
    return file


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
