"""Columns that mark rows, yes or no in the ways that tables write it; what is neither is counted."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from dermray.corpus.spelling import is_placeholder

YES = frozenset({"1", "1.0", "true", "yes"})
NO = frozenset({"0", "0.0", "false", "no"})
SHOWN_CHARS = 20


def read(column: pa.Array) -> tuple[list[int], Counter[str]]:
    """The numbers, from 0, of the rows that say yes; and the texts that are neither yes, no nor a placeholder."""
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    yes = pc.indices_nonzero(pc.is_in(plain, value_set=pa.array(sorted(YES)))).to_pylist()
    counts = {each["values"]: each["counts"] for each in pc.value_counts(plain).to_pylist()}
    unread = {text: count for text, count in counts.items() if text not in YES | NO and not is_placeholder(text)}
    return yes, Counter(unread)


def is_column(column: pa.Array) -> bool:
    """Whether most of a column's cells that say anything are marks, as 0 and 1 are."""
    _, unread = read(column)
    said = sum(not is_placeholder(cell) for cell in column.to_pylist())
    return said > 0 and 2 * unread.total() < said


def note(unused: Counter[str], what: str, unread: Counter[str]) -> None:
    """Count texts that are no marks, by the column that `what` names."""
    if unread:
        text = next(iter(unread))[:SHOWN_CHARS]
        unused[f"{what}: cells such as {text!r} that say neither yes nor no"] += unread.total()
