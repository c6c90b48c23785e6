"""One file name, written in several ways: by Windows, by a Macintosh, by hand."""

from __future__ import annotations

import unicodedata


def folded(path: str) -> str:
    r"""A path in the form by which two spellings of one name are equal.

    `.\images\é.jpg` with the accent as a letter of its own (NFD, as a Macintosh stores names) is `images/é.jpg` in NFC.
    Upper and lower case stay apart: `A.jpg` and `a.jpg` may both exist.
    """
    plain = unicodedata.normalize("NFC", path.strip().replace("\\", "/"))
    while plain.startswith("./"):
        plain = plain[2:].lstrip("/")
    return plain


def other_spellings(path: str) -> tuple[str, ...]:
    """Ways to write a path that mean the same file, the path itself left out."""
    plain = folded(path)
    ways = (plain, unicodedata.normalize("NFD", plain))
    # A backslash may also be part of a name, so that what only differs by accents is tried as well.
    kept = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return tuple(way for way in dict.fromkeys((*ways, *kept)) if way != path)
