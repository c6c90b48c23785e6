"""Turns what a photograph shows into a row of the raw table, in the manner of the sources Derm1M was made from.

Teaching videos narrate, publications caption, picture collections label, and forums tell a case. Fields are
left out as often as there, with the same placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dermray.corpus.synthetic.condition import Condition
from dermray.corpus.synthetic.conditions import CONDITIONS
from dermray.corpus.synthetic.drawing import Attributes

COLUMNS = (
    "filename", "caption", "truncated_caption", "source", "source_type", "disease_label",
    "hierarchical_disease_label", "skin_concept", "body_location", "symptoms", "age", "gender",
)  # fmt: skip
NO_CONCEPTS = "No visual concepts"
NO_LOCATION = "No body location information"
NO_SYMPTOMS = "No symptom information"
NO_AGE = "No age information"
NO_GENDER = "No gender information"
NO_DIAGNOSIS = "no definitive diagnosis"

# CLIP reads 77 tokens; English medical prose takes about 1.4 tokens a word.
MAX_TRUNCATED_WORDS = 52
SENTENCE_START = re.compile(r"^[a-z]|(?<=[.?!] )[a-z]")
TONES = ("very fair", "fair", "light brown", "olive", "brown", "dark brown")
ROMAN = ("I", "II", "III", "IV", "V", "VI")
MASS_NOUNS = ("scale", "erythema", "purpura")
BILATERAL_SITES = frozenset(
    {"arm", "leg", "elbow", "knee", "hand", "foot", "ankle", "wrist", "thigh", "shoulder", "forearm", "ear", "cheek"}
)


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of rows: the table's `source`, the folder of its images, and how often it occurs."""

    name: str
    folder: str
    source_type: str
    share: float


SOURCES = (
    Source("youtube", "youtube", "edu", 0.45),
    Source("public", "public", "knowledge", 0.15),
    Source("IIYI_chinese", "IIYI", "forum", 0.12),
    Source("pubmed_english", "pubmed", "knowledge", 0.13),
    Source("textbook_english", "edu", "knowledge", 0.09),
    Source("textbook_chinese", "note", "knowledge", 0.04),
    Source("twitter_english", "twitter", "forum", 0.02),
)


@dataclass(frozen=True, slots=True)
class Case:
    """The words that templates are filled with; `age` and `gender` are what the row's author knew."""

    name: str
    finding: str
    border: str
    a_border: str
    scale: str
    distribution: str
    where: str
    tone: str
    patient: str
    symptom: str
    concepts: str
    branch: str
    rival: str


Template: TypeAlias = str

OPENINGS_EDU: tuple[Template, ...] = (
    "This image shows {name} {where}: {finding} with {a_border} border, {scale}.",
    "The picture shows {finding} {where}, typical of {name}.",
    "Here is an example of {name}, seen as {finding} on {tone} skin.",
    "In this frame we see {name}; look for {finding}, {distribution}.",
    "This close-up shows {name} with {concepts} on {tone} skin.",
    "A case of {name} {where} in {patient}, showing {finding}.",
)
FOLLOW_UPS: tuple[Template, ...] = (
    "The border is {border} and the lesion is {scale}.",
    "The arrangement is {distribution}.",
    "Key features are {concepts}.",
    "It belongs to the {branch} conditions.",
    "Patients may report {symptom}.",
    "The skin tone is {tone}.",
)
LEGENDS: tuple[Template, ...] = (
    "{name}. {finding} {where}.",
    "{name} {where} of {patient}.",
    "Clinical photograph of {name} showing {finding} with {a_border} border.",
    "{finding}, {distribution}, in {patient} with {name}.",
    "Typical {name}: {concepts}.",
    "{name} on {tone} skin, {scale}.",
)
LABELS: tuple[Template, ...] = (
    "A clinical skin photograph, labelled as {name}.",
    "A clinical skin photograph, labelled as {name}, one of the {branch} skin diseases.",
    "Skin photograph of {name}, which belongs to {branch}.",
    "A photograph that shows {concepts}, labelled as {name}.",
)
FORUM_OPENINGS: tuple[Template, ...] = (
    "The patient is {patient} with {finding} {where} for {duration}.",
    "{patient}: {finding} {where}, noticed {duration} ago.",
    "Asking for opinions about {patient} with {finding}, {distribution}.",
)
FORUM_CLOSINGS: tuple[Template, ...] = (
    "The members agree on {name}.",
    "The most likely diagnosis is {name}.",
    "Diagnosis: {name}.",
    "The discussion leans towards {name} because of the {border} border and {concepts}.",
)
FORUM_DETAILS: tuple[Template, ...] = (
    "The main complaint is {symptom}, worse at night, and it has not improved with the ointments bought so far.",
    "On examination the skin is {tone} and the findings are {concepts}; the rest of the skin and the nails are normal.",
    "One member considers {rival}, but the arrangement, {distribution}, and the surface, {scale}, speak against it.",
    "Blood tests were within normal limits and there is no family history of a similar disease.",
    "A small sample was taken under local anaesthetic, and the result will be posted when it arrives next week.",
)
UNDIAGNOSED: tuple[Template, ...] = (
    "{finding} {where}; the diagnosis is not established.",
    "This image shows {tone} skin with {finding}, without a definite diagnosis.",
    "Photograph before treatment {where}.",
)


def describe(attributes: Attributes, rng: np.random.Generator, source: Source) -> dict[str, str]:
    """The row of one photograph, without its `filename`; keys are `COLUMNS`."""
    condition = attributes.condition
    age = int(rng.integers(condition.ages[0], condition.ages[1] + 1))
    gender = "female" if rng.random() < 0.5 else "male"
    tells_age, tells_gender = rng.random() < 0.25, rng.random() < 0.28
    case = _case(attributes, rng, _patient(age if tells_age else None, gender if tells_gender else None, rng))
    undiagnosed = rng.random() < 0.02
    writer = _undiagnosed if undiagnosed else WRITERS[source.source_type if source.name != "public" else "public"]
    caption = writer(case, rng)
    if not undiagnosed and rng.random() < 0.01:
        caption = condition.name.split()[-1].capitalize()
    label, hierarchy = _labels(condition, rng, undiagnosed)
    symptoms = ", ".join(condition.symptoms[: 1 + int(rng.integers(2))])
    return {
        "caption": caption,
        "truncated_caption": truncate(caption),
        "source": source.name,
        "source_type": source.source_type,
        "disease_label": label,
        "hierarchical_disease_label": hierarchy,
        "skin_concept": ", ".join(attributes.concepts) if rng.random() < 0.82 else NO_CONCEPTS,
        "body_location": attributes.site if rng.random() < 0.45 else NO_LOCATION,
        "symptoms": symptoms if symptoms and rng.random() < 0.3 else NO_SYMPTOMS,
        "age": str(age) if tells_age else NO_AGE,
        "gender": gender if tells_gender else NO_GENDER,
    }


def truncate(caption: str) -> str:
    """The caption's leading sentences that fit CLIP's context; a first sentence that does not fit is cut."""
    words = caption.split()
    if len(words) <= MAX_TRUNCATED_WORDS:
        return caption
    ends = [index + 1 for index, word in enumerate(words[:MAX_TRUNCATED_WORDS]) if word.endswith((".", "!", "?"))]
    return " ".join(words[: ends[-1] if ends else MAX_TRUNCATED_WORDS])


def _narrated(case: Case, rng: np.random.Generator) -> str:
    sentences = [_pick(OPENINGS_EDU, rng)]
    if rng.random() < 0.55:
        sentences.append(_pick(FOLLOW_UPS, rng))
    return _fill(sentences, case, rng)


def _legend(case: Case, rng: np.random.Generator) -> str:
    return _fill([_pick(LEGENDS, rng)], case, rng)


def _label(case: Case, rng: np.random.Generator) -> str:
    return _fill([_pick(LABELS, rng)], case, rng)


def _forum(case: Case, rng: np.random.Generator) -> str:
    details: list[Template] = []
    if rng.random() < 0.35:
        chosen = rng.choice(len(FORUM_DETAILS), int(rng.integers(2, len(FORUM_DETAILS) + 1)), replace=False)
        details = [FORUM_DETAILS[index] for index in sorted(chosen.tolist())]
    return _fill([_pick(FORUM_OPENINGS, rng), *details, _pick(FORUM_CLOSINGS, rng)], case, rng)


def _undiagnosed(case: Case, rng: np.random.Generator) -> str:
    return _fill([_pick(UNDIAGNOSED, rng)], case, rng)


WRITERS: dict[str, Callable[[Case, np.random.Generator], str]] = {
    "edu": _narrated, "knowledge": _legend, "public": _label, "forum": _forum,
}  # fmt: skip


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _fill(sentences: Sequence[Template], case: Case, rng: np.random.Generator) -> str:
    duration = f"{int(rng.integers(2, 12))} {_pick(('days', 'weeks', 'months'), rng)}"
    words = {field: getattr(case, field) for field in Case.__slots__}
    filled = [sentence.format(duration=duration, **words) for sentence in sentences]
    return SENTENCE_START.sub(lambda start: start[0].upper(), " ".join(filled))


def _case(attributes: Attributes, rng: np.random.Generator, patient: str) -> Case:
    condition = attributes.condition
    name = condition.name if rng.random() < 0.75 else _pick((condition.name, *condition.synonyms), rng)
    tone = TONES[attributes.skin_type - 1]
    if rng.random() < 0.25:
        tone = f"Fitzpatrick type {ROMAN[attributes.skin_type - 1]}"
    concepts = list(attributes.concepts)
    rng.shuffle(concepts)
    return Case(
        name=name,
        finding=_finding(condition, attributes.num_lesions),
        border=condition.border,
        a_border=_with_article(condition.border),
        scale="without scale" if condition.scale == "no scale" else f"with {condition.scale}",
        distribution=condition.distribution,
        where=_where(attributes.site, rng),
        tone=tone,
        patient=patient,
        symptom=_pick(condition.symptoms or ("no discomfort",), rng),
        concepts=_listing([concept.split("(")[0].split("/")[0] for concept in concepts[:3]]),
        branch=condition.path[-2],
        rival=_pick([other.name for other in CONDITIONS if other is not condition], rng),
    )


def _labels(condition: Condition, rng: np.random.Generator, undiagnosed: bool) -> tuple[str, str]:
    """`disease_label` and `hierarchical_disease_label`, with the faults that the real table has."""
    if undiagnosed:
        return NO_DIAGNOSIS, ""
    fate = rng.random()
    path = ", ".join(condition.path)
    if fate < 0.02:
        return condition.name, ""
    siblings = [other.name for other in CONDITIONS if other.path[:-1] == condition.path[:-1] and other != condition]
    if fate < 0.03 and siblings:
        # Two diseases in one cell, as where a collection files two under one heading.
        sibling = _pick(siblings, rng)
        return f"{condition.name}, {sibling}", f"{path}, {sibling}"
    return (_pick(condition.synonyms, rng) if condition.synonyms and fate < 0.10 else condition.name), path


def _finding(condition: Condition, num_lesions: int) -> str:
    """Colour and morphology in the singular or plural: "a salmon-red plaque", "tense bullae"."""
    phrase = f"{condition.colour} {condition.morphology}"
    if condition.morphology.endswith(MASS_NOUNS):
        return phrase
    if num_lesions == 1:
        return _with_article(phrase)
    if phrase.endswith("bulla"):
        return phrase + "e"
    return phrase + ("es" if phrase.endswith(("ch", "sh", "s")) else "s")


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def _where(site: str, rng: np.random.Generator) -> str:
    if site in BILATERAL_SITES and rng.random() < 0.4:
        return f"on the {_pick(('left', 'right'), rng)} {site}"
    return f"in the {site}" if site in ("groin", "armpit") else f"on the {site}"


def _patient(age: int | None, gender: str | None, rng: np.random.Generator) -> str:
    nouns = {"female": ("girl", "woman"), "male": ("boy", "man"), None: ("child", "patient")}[gender]
    if age is None:
        return f"a {gender} patient" if gender else "a patient"
    noun = nouns[age >= 16]
    if age == 0:
        return f"a {int(rng.integers(2, 12))}-month-old {noun}"
    return f"{'an' if age in (8, 11, 18) or 80 <= age < 90 else 'a'} {age}-year-old {noun}"


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
