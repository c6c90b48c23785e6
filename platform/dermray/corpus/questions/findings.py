"""Which findings surely are not one: by the words of their names, where words that say the same are one word.

Which words do is data (`findings.json`). `Brown(Hyperpigmentation)` is two names, each of which could be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources

from dermray import documents
from dermray.corpus.questions.words import words

TABLE_NAME = "findings.json"
# What stands between two names of a finding; a hyphen, an apostrophe and an underscore join words of one.
_APART = re.compile(r"[^\w\s'\u2019-]|\b(?:and|or)\b", re.IGNORECASE)


def may_hold_with(one: str, other: str) -> bool:
    """Whether two findings could be one, or one a kind of the other: all words of a name lie in one of the other's.

    `ulcer`, `Ulcerated (surface)` → yes; `pigment network`, `atypical pigment network` → yes; `papule`, `scale` → no.
    """
    return any(first <= second or second <= first for first in _names(one) for second in _names(other))


def said(texts: Iterable[str]) -> frozenset[str]:
    """The words of texts, each by the one that stands for all that say the same."""
    return frozenset(map(_one_for_all, frozenset[str]().union(*map(words, texts))))


def is_named(finding: str, words_said: frozenset[str]) -> bool:
    """Whether all words of one of the finding's names are among those of texts (`said`), also where it is denied."""
    return any(name <= words_said for name in _names(finding))


@cache
def _names(finding: str) -> tuple[frozenset[str], ...]:
    """The names that a finding's holds, each as its words."""
    return tuple(filter(None, (said([part]) for part in _APART.split(finding))))


def _one_for_all(word: str) -> str:
    return _table().get(word, word)


@cache
def _table() -> dict[str, str]:
    """Word → the first of those that say the same."""
    text = resources.files(__package__).joinpath(TABLE_NAME).read_text(encoding="utf-8")
    return {
        form: group[0]
        for group in documents.parse_json(text, TABLE_NAME)["alike"]
        for each in group
        for form in words(each)
    }
