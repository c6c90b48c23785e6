"""The words of a name, so that names which say the same, or one of which says more, can be told."""

from __future__ import annotations

import re
from functools import lru_cache

from dermray.corpus import spelling

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> frozenset[str]:
    """Its words in the singular, folded and in American spelling, no matter their order and the signs between them.

    `Bowen's disease` → bowen, disease; `nevi (dysplastic)` → nevus, dysplastic.
    """
    return frozenset(map(_folded, set(_WORD.findall(spelling.key(text)))))


@lru_cache(maxsize=100_000)
def _folded(word: str) -> str:
    return spelling.spelling(word)
