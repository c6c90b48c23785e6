"""Texts of others (names, labels, paths) on one line of a terminal or a log."""

from __future__ import annotations

import re

# Control characters (a new line forges a record, an escape code moves the cursor), marks that turn the reading
# direction, line and paragraph separators, and halves of surrogate pairs, which no stream takes.
_TROUBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with what is no letter, mark or blank written as its escape: `a\\nb` for two lines."""
    return _TROUBLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
