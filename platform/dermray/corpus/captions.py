"""Caption aspects of a sample and how each is made.

`raw` is what the source says, `ontology` names the diagnosis with its path in the disease tree, `concept` names the
visible features; the sentences are those of Derm1M (arXiv 2503.14911). `sub` are the sentences of a raw caption, at
most eight, as MAKE (arXiv 2505.09372) trains on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.corpus.sentences import sentences, without_bullet
from dermray.corpus.spelling import is_placeholder

ONTOLOGY_TEMPLATE = "This is a skin photo diagnosed as {}."
CONCEPT_TEMPLATE = "This skin photo shows {}."

MAX_SUB_CAPTIONS = 8

Caption = tuple[CaptionAspect, str]


def ontology_caption(names: Sequence[str]) -> str | None:
    """Sentence over a path of diagnosis names, coarse to fine, without those that say nothing; None without any."""
    named = ", ".join(dict.fromkeys(name.strip() for name in names if not is_placeholder(name)))
    return ONTOLOGY_TEMPLATE.format(named) if named else None


def concept_caption(concepts: Sequence[str]) -> str | None:
    """Sentence over visible features; None without any."""
    named = ", ".join(dict.fromkeys(concept.strip() for concept in concepts if concept.strip()))
    return CONCEPT_TEMPLATE.format(named) if named else None


def named_in(template: str, sentence: str) -> str | None:
    """What a sentence of one of the two templates names, as it is written there; None for any other sentence."""
    opening, closing = (part.casefold() for part in template.split("{}"))
    plain = sentence.rstrip()
    if not plain.casefold().startswith(opening):
        return None
    return plain[len(opening) :].removesuffix(closing).strip() or None


def sub_captions(text: str, limit: int = MAX_SUB_CAPTIONS) -> list[str]:
    """The first sentences of a raw caption, each once, at most `limit`, the bullets before them left out.

    A trailing "None" says nothing.
    """
    parts = map(without_bullet, sentences(text))
    said = (part for part in parts if not is_placeholder(part.strip(" .")))
    return list(dict.fromkeys(said))[:limit]


def with_sub_captions(captions: Sequence[Caption], parts_of: Callable[[str], Iterable[str]]) -> list[Caption]:
    """Captions with the parts of each raw one as sub-captions behind it, as `parents` finds them.

    Those of the first raw caption come behind all but the other raw ones, which follow with theirs.
    """
    raw = [place for place, (aspect, _) in enumerate(captions) if aspect == "raw"]
    made = [caption for place, caption in enumerate(captions) if place not in raw[1:]]
    for number, place in enumerate(raw):
        made.extend([captions[place]] if number else [])
        made.extend(("sub", part) for part in parts_of(captions[place][1]))
    return made


def parents(aspects: Sequence[str]) -> list[int | None]:
    """The place of the raw caption that each of a sample's captions is a part of; None for what is no sub-caption.

    A sub-caption is a part of the raw caption before it. Where a source brings sub-captions and no raw caption before
    them, that is None too.

    Args:
        aspects: of the sample's captions, in their order.
    """
    found: list[int | None] = []
    raw = None
    for place, aspect in enumerate(aspects):
        raw = place if aspect == "raw" else raw
        found.append(raw if aspect == "sub" else None)
    return found


def diagnosis_path(labels: Iterable[str], ontology: Ontology) -> list[str]:
    """Names for `ontology_caption`: the ancestors that several labels share come once, then each label.

    Only ancestors that hold on every path of a label are named, and of synonyms the first, in lower case.
    """
    nodes = dict.fromkeys(node for label in labels for node in ontology.path(label))
    return [ontology.synonyms(node)[0].lower() for node in nodes]


def distinct(captions: Iterable[Caption]) -> list[Caption]:
    """Captions in order, each once; blank ones left out."""
    return list(dict.fromkeys((aspect, text) for aspect, text in captions if text.strip()))


def joined(several: Iterable[Sequence[Caption]]) -> list[Caption]:
    """The captions of several rows or samples of one image, each once, in order; blank ones left out.

    A sub-caption that a later one brings of a raw caption that is there goes behind that caption's others, so that
    `parents` finds it: [raw A, sub a, raw B] and [raw A, sub c] are [raw A, sub a, sub c, raw B].
    """
    found: list[Caption] = []
    for captions in map(distinct, several):
        known = set(found)
        owners = parents([aspect for aspect, _ in captions])
        for caption, owner in zip(captions, owners, strict=True):
            if caption in known:
                continue
            if owner is None or captions[owner] not in known:
                found.append(caption)
                continue
            of_found = parents([aspect for aspect, _ in found])
            place = found.index(captions[owner])
            found.insert(max([place, *(each for each, of in enumerate(of_found) if of == place)]) + 1, caption)
    return found
