"""What a table says of the kind of its pictures: `corpus.modality` read for whole columns."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.modality import modality
from dermray.raw.sources.rows import Findings, map_values, text

# Rows that a message names of all texts that are not understood.
NUM_ROWS = 5


def modalities(findings: Findings, column: str, cells: pa.Array, rows: pa.Array | Sequence[int]) -> pa.Array:
    """The modality of each row; texts that no reading fits are null, and `findings` gets them with their rows.

    The cells are to be kept as written besides (`meta.extra`), as these few words say less than a table may.

    Args:
        findings: of the source.
        column: name of the column, for messages.
        cells: as they were read, string `[N]`; blank ones and placeholders say nothing.
        rows: number of each row in its table, int64 `[N]`.

    Returns:
        Words of `MODALITIES` or null, string `[N]`.
    """
    said = text(cells)
    read = map_values(said, modality, pa.string())
    unread = pc.and_(pc.is_valid(said), pc.is_null(read))
    if pc.any(unread).as_py():
        for each in pc.value_counts(said.filter(unread)).to_pylist():
            findings.unread_modalities[f"{column}: {each['values']}"] += each["counts"]
        numbers = pa.array(rows, pa.int64()).filter(unread)[:NUM_ROWS].to_pylist()
        findings.unread_modality_rows[:] = [*findings.unread_modality_rows, *numbers][:NUM_ROWS]
    return read
