"""Names of skin diseases beyond those of a disease tree: synonyms, lay words, abbreviations, codes of data sets.

The table `dermatology.json` comes with the package. Each of its rows names where it is from, with a licence that lets
it be passed on; none of it has been checked by a clinician for any use. A spelling means one name or none: what could
mean two things is listed as ambiguous and resolves to nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from dermray.corpus import spelling

TABLE_NAME = "dermatology.json"
# A row's kinds that are no words for a prompt or a caption.
SHORT_KINDS = frozenset({"code", "abbreviation"})
BENIGN, MALIGNANT = "benign", "malignant"
# Names that hold one of the table's words of malignancy, and yet are none.
_NOT_THAT_WORD = frozenset({"benign", "juvenile", "pseudo", "syndrome"})
_NOT_THAT = ("pseudo", "pre", "non")


@dataclass(frozen=True)
class Meaning:
    """A disease: its name to show, and every other way to write it."""

    name: str
    spellings: tuple[str, ...]


class Synonyms:
    """The table, looked up by `spelling.spelling`: case, plural, accents, British or American do not matter."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """From the parsed table."""
        self.document = document
        self._name_of = {_folded(row["spelling"]): row["means"] for row in document["spellings"]}
        self._short = {_folded(row["spelling"]) for row in document["spellings"] if row["kind"] in SHORT_KINDS}
        written: dict[str, list[str]] = {}
        for row in document["spellings"]:
            written.setdefault(row["means"], []).append(row["spelling"])
        self._meanings = {
            name: Meaning(name, tuple(text for text in texts if text != name)) for name, texts in written.items()
        }
        self._broader = {row["of"]: row["is"] for row in document["broader"]}
        self._ambiguous = {_folded(row["spelling"]): tuple(row["may_mean"]) for row in document["ambiguous"]}
        self._branches = {row["name"]: row["branch"] for row in document["branches"]}
        self._words = {row["word"]: row["branch"] for row in document["words"]}

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls) -> Synonyms:
        """The table that comes with the package."""
        text = resources.files("dermray.corpus").joinpath(TABLE_NAME).read_text(encoding="utf-8")
        return cls(json.loads(text))

    def meaning(self, text: str) -> Meaning | None:
        """The disease that a text means, or None; also None where it could mean several."""
        name = self._name_of.get(_folded(text))
        return None if name is None else self._meanings[name]

    def meanings(self, text: str) -> Iterator[Meaning]:
        """What a text means, and then ever broader diseases that this is one of."""
        meaning = self.meaning(text)
        while meaning is not None:
            yield meaning
            broader = self._broader.get(meaning.name)
            meaning = None if broader is None else self._meanings[broader]

    def may_mean(self, text: str) -> tuple[str, ...]:
        """What an ambiguous text could mean; empty for any other."""
        return self._ambiguous.get(_folded(text), ())

    def is_short(self, text: str) -> bool:
        """True for a code or an abbreviation, which says nothing to a reader who does not know it."""
        return _folded(text) in self._short

    def branch(self, text: str) -> str | None:
        """`benign` or `malignant` where a name says so or the table does; None where neither does."""
        for meaning in self.meanings(text):
            if meaning.name in self._branches:
                return self._branches[meaning.name]
        names = (text, *(meaning.name for meaning in self.meanings(text)))
        return next(filter(None, map(self._branch_by_word, names)), None)

    def is_denied(self, text: str) -> bool:
        """True for a text that holds a word of malignancy, and says that it is not that, or asks: `?melanoma`."""
        return any(denied for _, denied in self._telling(text))

    def _branch_by_word(self, name: str) -> str | None:
        return next((branch for branch, denied in self._telling(name) if not denied), None)

    def _telling(self, name: str) -> Iterator[tuple[str, bool]]:
        """The branch that each word of a name tells, and whether the words around it deny that."""
        words = spelling.singular(spelling.key(name).replace("?", " ? ")).replace(",", "").split()
        if _NOT_THAT_WORD.intersection(words):
            return
        for place, word in enumerate(words):
            branch = next((branch for end, branch in self._words.items() if word.endswith(end)), None)
            if branch and not word.startswith(_NOT_THAT) and words[place - 1 : place] != ["non"]:
                yield branch, spelling.denies(" ".join(words[:place]), " ".join(words[place + 1 :]))

    def unify(self, labels: Mapping[str, int]) -> dict[str, str]:
        """One name for all labels of one meaning or one spelling: label → name, given how often each occurs.

        The name is the most frequent spelling that is no abbreviation, else the name in the table.
        """
        groups: dict[tuple[str | None, str], list[str]] = {}
        for label in labels:
            meaning = self.meaning(label)
            groups.setdefault((meaning.name, "") if meaning else (None, _folded(label)), []).append(label)
        names: dict[str, str] = {}
        for (meant, _), written in groups.items():
            words = Counter[str]()
            for label in written:
                if not self.is_short(label):
                    words[" ".join(label.split())] += labels[label]
            frequent = min(words, key=lambda word: (-words[word], word), default=meant or written[0])
            names.update(dict.fromkeys(written, frequent))
        return names


def _folded(text: str) -> str:
    return spelling.spelling(spelling.key(text))
