"""Which nodes of a disease tree are the branches benign and malignant, by the words of their names.

Trees name them in many ways (`Benign lesions`, `gutartig`, `Non-malignant`, `Skin cancer`, 良性); what is meant is told
by words, never by where the node stands.
"""

from __future__ import annotations

import re

from dermray.corpus import spelling
from dermray.corpus.graph import ROOT
from dermray.corpus.synonyms import BENIGN, MALIGNANT

OPPOSITE = {BENIGN: MALIGNANT, MALIGNANT: BENIGN}
# How words begin that say it: English, Latin, German (\u00f6 is o or oe, which is e), Romance languages, Dutch.
_BENIGN = ("benign", "gutartig", "benin", "goedaardig")
_MALIGNANT = ("malign", "bosartig", "besartig", "kwaadaardig")
_CANCER = ("cancer", "cancerous", "malin", "maline")
# Chinese puts no spaces between words.
_CHINESE = {"\u826f\u6027": BENIGN, "\u6076\u6027": MALIGNANT, "\u60e1\u6027": MALIGNANT}
_CHINESE_NOT = "\u975e"
# Before such a word: it is the other branch, or neither.
_NOT = frozenset({"non", "not", "no", "nicht", "niet", "ne"})
_NEITHER = frozenset({"pre", "potentially", "possibly", "facultative"})
# Words of nodes that hold no malignant disease. Not `viral`: a virus may make a tumour.
_NO_GROWTHS = frozenset({"infectious", "infection", "bacterial", "fungal", "parasitic"})
_GROWTHS = ("neoplas", "tumor")
# How words begin that the name of a branch may hold besides, without naming some diseases only.
_ANY = (
    *("lesi", "lasi", "haut", "tumor", "tumeur", "neoplas", "growth", "prolifer", "disease", "disorder", "condition"),
    *("skin", "cutan", "kutan", "dermatolog", "peau", "piel", "categor", "class", "group"),
)
_LINKS = frozenset({"and", "or", "of", "the", "de", "la", "der"})
_WORD = re.compile(r"[^\W\d_]+")


def side_of(name: str) -> str | None:
    """`benign` or `malignant` where the name of a branch says so; None where it says neither, or both."""
    said = {side for _, side in _words(name) if side} if name != ROOT else set()
    return said.pop() if len(said) == 1 else None


def is_general(name: str) -> bool:
    """Whether the name of a branch says its side and nothing else, so that any disease of that side may stand below."""
    return side_of(name) is not None and all(
        side or word.startswith(_ANY) or word in _NOT or word in _LINKS for word, side in _words(name)
    )


def is_no_growth(name: str) -> bool:
    """Whether the name of a branch says that no malignant disease stands below: infections, what is no neoplasm."""
    words = _WORD.findall(spelling.spelling(spelling.key(name), joined=False))
    return any(
        bare.startswith(_GROWTHS) if denied else bare in _NO_GROWTHS
        for bare, denied in (_negated(words, place) for place in range(len(words)))
    )


def _words(name: str) -> list[tuple[str, str | None]]:
    """The words of a name, each with the side that it says."""
    words = _WORD.findall(spelling.spelling(spelling.key(name), joined=False))
    return [(word, _side(words, place)) for place, word in enumerate(words)]


def _side(words: list[str], place: int) -> str | None:
    word, denied = _negated(words, place)
    if place and words[place - 1] in _NEITHER:
        return None
    side = next((side for mark, side in _CHINESE.items() if mark in word), None)
    if word.startswith(_BENIGN):
        side = BENIGN
    elif word.startswith(_MALIGNANT) or word in _CANCER:
        side = MALIGNANT
    return OPPOSITE[side] if side and denied else side


def _negated(words: list[str], place: int) -> tuple[str, bool]:
    """A word without the syllable that negates it, and whether that or the word before it does."""
    word = words[place]
    bare = word.removeprefix("non").removeprefix("nicht")
    return bare, bare != word or _CHINESE_NOT in word or (place > 0 and words[place - 1] in _NOT)
