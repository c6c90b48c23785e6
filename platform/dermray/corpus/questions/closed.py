"""Closed questions of a sample: which condition, which body site, what kind of picture, is a finding there.

Wrong answers are drawn from what other samples say, without those that could be true of the sample too as far as our
tables tell: conditions akin to one of its labels (`kinship`), body sites of the same region (`body_sites`), findings
of the words of a mark (`findings`) or that a caption names. The draw is a function of the seed, the sample's id, the
set of answers and how often each is given (`frequency`): in what order samples are asked changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from dermray.corpus import spelling
from dermray.corpus.modality import PHOTOGRAPHS
from dermray.corpus.ontology import Ontology, display_names
from dermray.corpus.questions import findings, frequency
from dermray.corpus.questions.body_sites import regions
from dermray.corpus.questions.kinship import Sense
from dermray.corpus.questions.templates import Templates

CONDITION, BODY_SITE, MODALITY, PRESENT, ABSENT = KINDS = ("condition", "body_site", "modality", "present", "absent")
# Answers to choose from, where there are so many that are surely wrong.
NUM_ANSWERS = 4
YES, NO = YES_OR_NO = ("Yes", "No")
WITHOUT_LABEL, WITHOUT_SITE, WITHOUT_MODALITY = "without a label", "without a body site", "without a kind of picture"
WITHOUT_MARK = "without a mark of any finding"
NO_REGION, NOTHING_WRONG = "body site of no known region", "no answer that is surely wrong"
OUTSIDE_CLASSES, ALL_NAMED = "label outside the class list", "captions name every finding without a mark"


@dataclass(frozen=True)
class Facts:
    """What a sample says that can be asked.

    Attributes:
        condition: the label to ask for, None where it has none.
        labels: all of them; none is a wrong answer.
        concepts: findings marked as present, in lower case.
        body_site: in lower case, None where it is not known.
        modality: a word of `corpus.modality`.
        captions: all that is said of the picture; a finding that one of them names is not asked for as absent.
    """

    sample_id: str
    condition: str | None
    labels: tuple[str, ...]
    concepts: tuple[str, ...]
    body_site: str | None
    modality: str | None
    captions: tuple[str, ...] = ()

    @classmethod
    def of(cls, sample: Mapping[str, Any], ontology: Ontology) -> Facts:
        """Of a prepared sample (a row of `corpus.schema.WHOLE`, its image not needed)."""
        return cls(
            sample["sample_id"],
            ontology.deepest(sample["labels"]),
            tuple(sample["labels"]),
            plain_concepts(sample["concepts"]),
            plain_site((sample["meta"] or {}).get("body_site")),
            sample.get("modality"),
            tuple(caption["text"] for caption in sample["captions"]),
        )


def plain_concepts(concepts: Iterable[str]) -> tuple[str, ...]:
    """Marks as they are asked for, each once: `Pigment_network` → `pigment network`."""
    return tuple(dict.fromkeys(" ".join(each.replace("_", " ").lower().split()) for each in concepts))


def plain_site(site: str | None) -> str | None:
    """A body site in lower case; None for a cell that says nothing."""
    return None if site is None or spelling.is_placeholder(site) else " ".join(site.lower().split())


@dataclass(frozen=True)
class Question:
    """A closed question.

    Attributes:
        options: the answers, as a reader sees them; `answer` is the place of the right one.
        statements: of each answer, sentences that would be true of the picture, as many for each.
    """

    kind: str
    text: str
    options: tuple[str, ...]
    statements: tuple[tuple[str, ...], ...]
    answer: int


@dataclass(frozen=True)
class Pool:
    """The answers that samples of a split give, sorted.

    Attributes:
        conditions: label → name to show.
        body_sites, concepts: site of a known region, and finding → how much it is drawn as a wrong answer.
        modalities: kinds of picture.
    """

    conditions: Mapping[str, str]
    body_sites: Mapping[str, float]
    modalities: tuple[str, ...]
    concepts: Mapping[str, float]

    @classmethod
    def of(cls, samples: Iterable[Facts], conditions: Mapping[str, str] | None = None) -> Pool:
        """What occurs in samples, in any order; `conditions` where they are given beforehand."""
        labels, modalities, num_marked = set[str](), set[str](), 0
        sites, concepts = Counter[str](), Counter[str]()
        for facts in samples:
            labels.update(filter(None, [facts.condition]))
            sites.update(filter(None, [facts.body_site]))
            modalities.update(filter(None, [facts.modality]))
            concepts.update(facts.concepts)
            num_marked += bool(facts.concepts)
        occurring = sorted(labels)
        named = dict(zip(occurring, display_names(occurring), strict=True)) if conditions is None else conditions
        return cls(
            {label: named[label] for label in sorted(named)},
            frequency.of_sites(sites),
            tuple(sorted(modalities)),
            frequency.of_findings(concepts, num_marked),
        )


def draw_of(seed: int, kind: str, sample_id: str) -> np.random.Generator:
    """The random stream of a question of a sample: a function of these three."""
    digest = hashlib.sha256(f"{kind}\0{sample_id}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


class Asker:
    """Asks the samples of a split."""

    def __init__(self, pool: Pool, ontology: Ontology, seed: int = 0) -> None:
        """By the answers to choose from, the disease tree, and the seed of the draw."""
        self._pool, self._ontology, self._seed = pool, ontology, seed
        self._words = Templates.load()
        self._barred: dict[str, frozenset[str]] = {}

    def ask(self, facts: Facts) -> dict[str, Question | str]:
        """Every kind of question → the question, or why the sample cannot be asked it."""
        return {
            CONDITION: self._condition(facts),
            BODY_SITE: self._body_site(facts),
            MODALITY: self._modality(facts),
            PRESENT: self._present(facts),
            ABSENT: self._absent(facts),
        }

    def _condition(self, facts: Facts) -> Question | str:
        if facts.condition is None:
            return OUTSIDE_CLASSES if facts.labels else WITHOUT_LABEL
        barred = frozenset[str]().union(*map(self._may_hold_with, {facts.condition, *facts.labels}))
        names, draw = self._pool.conditions, draw_of(self._seed, CONDITION, facts.sample_id)
        labels = list(names)
        drawn = (labels[place] for place in draw.permutation(len(labels)))
        return self._choice(CONDITION, draw, facts.condition, (one for one in drawn if one not in barred), names)

    def _body_site(self, facts: Facts) -> Question | str:
        if facts.body_site is None:
            return WITHOUT_SITE
        own = regions(facts.body_site)
        if not own:
            return NO_REGION
        draw = draw_of(self._seed, BODY_SITE, facts.sample_id)
        drawn = _drawn(draw, *self._sites)
        return self._choice(BODY_SITE, draw, facts.body_site, (one for one in drawn if not regions(one) & own), {})

    def _modality(self, facts: Facts) -> Question | str:
        if facts.modality is None:
            return WITHOUT_MODALITY
        pool, draw = self._pool.modalities, draw_of(self._seed, MODALITY, facts.sample_id)
        true = {facts.modality} | (PHOTOGRAPHS if facts.modality in PHOTOGRAPHS else set())
        drawn = (pool[place] for place in draw.permutation(len(pool)))
        wrong = (each for each in drawn if each not in true)
        return self._choice(MODALITY, draw, facts.modality, wrong, self._words.modalities)

    def _present(self, facts: Facts) -> Question | str:
        if not facts.concepts:
            return WITHOUT_MARK
        draw = draw_of(self._seed, PRESENT, facts.sample_id)
        return self._is_there(PRESENT, draw, sorted(facts.concepts)[draw.integers(len(facts.concepts))])

    def _absent(self, facts: Facts) -> Question | str:
        if not facts.concepts:
            return WITHOUT_MARK
        draw = draw_of(self._seed, ABSENT, facts.sample_id)
        said, reason = findings.said(facts.captions), NOTHING_WRONG
        for finding in _drawn(draw, *self._findings):
            if any(findings.may_hold_with(finding, mark) for mark in facts.concepts):
                continue
            if not findings.is_named(finding, said):
                return self._is_there(ABSENT, draw, finding)
            reason = ALL_NAMED
        return reason

    def _choice(
        self,
        kind: str,
        draw: np.random.Generator,
        right: str,
        could_not_be: Iterable[str],
        named: Mapping[str, str],
    ) -> Question | str:
        """The right answer among the first three of those that cannot be true, in a drawn order."""
        wrong = list(islice(could_not_be, NUM_ANSWERS - 1))
        if not wrong:
            return NOTHING_WRONG
        given = [right, *wrong]
        order = draw.permutation(len(given)).tolist()
        options = tuple(named.get(given[place], given[place]) for place in order)
        words = self._words.closed[kind]
        statements = tuple(tuple(each.replace("{}", option) for each in words.statements) for option in options)
        text = words.questions[draw.integers(len(words.questions))]
        return Question(kind, text, options, statements, order.index(0))

    def _is_there(self, kind: str, draw: np.random.Generator, concept: str) -> Question:
        words = self._words.closed[kind]
        text = words.questions[draw.integers(len(words.questions))].replace("{}", concept)
        statements = tuple(each.replace("{}", concept) for each in words.statements)
        return Question(kind, text, YES_OR_NO, (statements, words.references), YES_OR_NO.index(_TRUE[kind]))

    def _may_hold_with(self, label: str) -> frozenset[str]:
        """The labels of the pool that could be true where this one is."""
        if label not in self._barred:
            sense = Sense.of(label, self._ontology)
            self._barred[label] = frozenset(other for other, each in self._senses.items() if sense.may_hold_with(each))
        return self._barred[label]

    @cached_property
    def _sites(self) -> tuple[list[str], np.ndarray]:
        return list(self._pool.body_sites), np.array(list(self._pool.body_sites.values()))

    @cached_property
    def _findings(self) -> tuple[list[str], np.ndarray]:
        return list(self._pool.concepts), np.array(list(self._pool.concepts.values()))

    @cached_property
    def _senses(self) -> dict[str, Sense]:
        return {label: Sense.of(label, self._ontology) for label in self._pool.conditions}


def _drawn(draw: np.random.Generator, answers: Sequence[str], weights: np.ndarray) -> Iterator[str]:
    """Answers in an order drawn by their weights."""
    return (answers[place] for place in frequency.order(draw, weights))


_TRUE = {PRESENT: YES, ABSENT: NO}
