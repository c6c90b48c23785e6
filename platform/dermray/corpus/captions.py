"""Caption aspects of a sample and how each is made.

`raw` is what the source says, `ontology` names the diagnosis with its path in the disease tree, `concept` names the
visible features. The sentences are those of Derm1M (arXiv 2503.14911).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CaptionAspect

ONTOLOGY_TEMPLATE = "This is a skin photo diagnosed as {}."
CONCEPT_TEMPLATE = "This skin photo shows {}."

Caption = tuple[CaptionAspect, str]


def ontology_caption(names: Sequence[str]) -> str | None:
    """Sentence over a path of diagnosis names, coarse to fine; None without any."""
    named = ", ".join(dict.fromkeys(name.strip() for name in names if name.strip()))
    return ONTOLOGY_TEMPLATE.format(named) if named else None


def concept_caption(concepts: Sequence[str]) -> str | None:
    """Sentence over visible features; None without any."""
    named = ", ".join(dict.fromkeys(concept.strip() for concept in concepts if concept.strip()))
    return CONCEPT_TEMPLATE.format(named) if named else None


def diagnosis_path(labels: Iterable[str], ontology: Ontology) -> list[str]:
    """Names for `ontology_caption`: the ancestors that several labels share come once, then each label.

    Only ancestors that hold on every path of a label are named, and of synonyms the first, in lower case.
    """
    nodes = dict.fromkeys(node for label in labels for node in ontology.sure_path(label))
    return [ontology.synonyms(node)[0].lower() for node in nodes]


def distinct(captions: Iterable[Caption]) -> list[Caption]:
    """Captions in order, each once; blank ones left out."""
    return list(dict.fromkeys((aspect, text) for aspect, text in captions if text.strip()))
