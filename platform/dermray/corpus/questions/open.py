"""Open questions of a sample and their answers, from its labels, the disease tree, its marks, facts and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dermray.corpus.ontology import Ontology
from dermray.corpus.questions.closed import (
    WITHOUT_LABEL,
    WITHOUT_MARK,
    WITHOUT_MODALITY,
    WITHOUT_SITE,
    Pool,
    draw_of,
    plain_concepts,
    plain_site,
)
from dermray.corpus.questions.templates import Templates

NOTHING_ABOVE, WITHOUT_SKIN_TYPE, WITHOUT_CAPTION = "nothing above in the tree", "without a skin type", "no caption"
SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


class Teller:
    """Tells what samples of a split say."""

    def __init__(self, pool: Pool, ontology: Ontology, seed: int = 0) -> None:
        """By the names of conditions, the disease tree, and the seed of the draw of words."""
        self._names, self._ontology, self._seed = pool.conditions, ontology, seed
        self._words = Templates.load()

    def tell(self, sample: Mapping[str, Any], caption: str | None) -> dict[str, Pair | str]:
        """Every kind of open question → question and answer, or why the sample gives none.

        Args:
            sample: a row of `corpus.schema.WHOLE`, its image not needed.
            caption: that describes the picture.
        """
        label = self._ontology.deepest(sample["labels"])
        modality, skin_type = sample.get("modality"), sample["skin_type"]
        site = plain_site((sample["meta"] or {}).get("body_site"))
        above = self._ontology.path(label)[:-1] if label is not None and label in self._ontology else []
        known: dict[str, tuple[str | None, str]] = {
            "diagnosis": (self._diagnosis(sample["labels"]), WITHOUT_LABEL),
            "tree": (self._way([*above, label or ""]) if above else None, NOTHING_ABOVE if label else WITHOUT_LABEL),
            "findings": (", ".join(plain_concepts(sample["concepts"])), WITHOUT_MARK),
            "site": (site, WITHOUT_SITE),
            "picture": (self._words.modalities[modality] if modality else None, WITHOUT_MODALITY),
            "skin_type": (SKIN_TYPES[skin_type - 1] if skin_type else None, WITHOUT_SKIN_TYPE),
            "description": (caption, WITHOUT_CAPTION),
        }
        return {
            kind: self._pair(kind, sample["sample_id"], said) if said else reason
            for kind, (said, reason) in known.items()
        }

    def _diagnosis(self, labels: Sequence[str]) -> str | None:
        named = [label for label in labels if label in self._ontology]
        return " and ".join(self._shown(label) for label in self._ontology.most_specific(named)) or None

    def _way(self, path: Sequence[str]) -> str:
        return " > ".join(map(self._shown, path))

    def _shown(self, label: str) -> str:
        """A node as the closed questions name it; one that is no sample's answer there by its first name."""
        return self._names.get(label) or self._ontology.synonyms(label)[0]

    def _pair(self, kind: str, sample_id: str, said: str) -> Pair:
        words, draw = self._words.open[kind], draw_of(self._seed, kind, sample_id)
        question = words.questions[draw.integers(len(words.questions))]
        return Pair(question, words.answers[draw.integers(len(words.answers))].replace("{}", said))
