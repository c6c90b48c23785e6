"""The words of questions and answers, which are data: `templates.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from dermray import documents

TEMPLATES_NAME = "templates.json"


@dataclass(frozen=True)
class ClosedWords:
    """Of a kind of closed question; `{}` is the answer, or what may be there.

    Attributes:
        title: what reports call the kind.
        questions: ways to ask; one is drawn for each sample.
        statements: what a picture of which an answer is true could be called; a model is asked by all of them.
        references: the same sentences of a picture of which nothing is said; empty for kinds with several answers.
    """

    title: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenWords:
    """Of a kind of open question: ways to ask and to answer, one of each is drawn; `{}` is what is known."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Templates:
    """All words, by kind.

    Attributes:
        modalities: what a kind of picture (`corpus.modality`) is called in a sentence.
        choose, yes_or_no: what a reader of a closed question is told to do.
    """

    closed: Mapping[str, ClosedWords]
    open: Mapping[str, OpenWords]
    modalities: Mapping[str, str]
    choose: str
    yes_or_no: str

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls) -> Templates:
        """Read the data file that comes with the package."""
        text = resources.files(__package__).joinpath(TEMPLATES_NAME).read_text(encoding="utf-8")
        document = documents.parse_json(text, TEMPLATES_NAME)
        return cls(
            closed={kind: ClosedWords(**_tuples(words)) for kind, words in document["closed"].items()},
            open={kind: OpenWords(**_tuples(words)) for kind, words in document["open"].items()},
            modalities=document["modalities"],
            choose=document["choose"],
            yes_or_no=document["yes_or_no"],
        )


def _tuples(words: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
