"""What a cell of a table holds, read the same way by every job."""

from __future__ import annotations

import ast
import io
import tokenize

from dermray.corpus.spelling import is_placeholder

MAX_LIST_CHARS = 10_000
# What stands in a list for an item that is not there: Python, JSON, pandas.
_NOTHING = frozenset({"None", "null", "nan", "NaN"})
_BETWEEN_ITEMS = frozenset({tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER})


def captions_in(cell: str) -> list[str]:
    """The captions of a cell, each once and its white space made single blanks: the texts that it lists, or its own."""
    listed = written_list(cell)
    texts = (" ".join(text.split()) for text in ([cell] if listed is None else listed))
    return list(dict.fromkeys(text for text in texts if not is_placeholder(text)))


def written_list(cell: str) -> list[str] | None:
    """The texts and whole numbers of a list as Python, JSON or NumPy writes it; None if it is no list.

    What says nothing is left out. NumPy puts no commas: `['Eczema' 'Psoriasis']`, which Python itself would read as one
    text.
    """
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")) or len(cell) > MAX_LIST_CHARS:
        return None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(cell[1:-1].strip()).readline))
        items = [token for token in tokens if token.type not in _BETWEEN_ITEMS and token.string != ","]
        values = [
            ast.literal_eval(item.string) for item in items if item.type != tokenize.NAME or item.string not in _NOTHING
        ]
    except (ValueError, SyntaxError, tokenize.TokenError):
        return None
    if not all(isinstance(value, str | int) for value in values):
        return None
    return [text for value in values if not is_placeholder(text := str(value).strip())]
