"""What an evaluation says of a raw table that nobody understands, or that is not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dermray.corpus.ontology import Ontology
from dermray.corpus.synonyms import Synonyms
from dermray.evaluate.statistics import groups
from dermray.raw.splits import told_of_others
from dermray.raw.telling import most_frequent, not_understood

# Beside the dimensions of `groups`, what is told of.
CLASSES, NO_NODES, CAPTIONS = "labels that make classes of their own", "labels that name no node", "captions"
SPLITS, OUTSIDE = "splits", "labels outside the class list"
IMAGES = "images"
AGAIN, LEARNT = "rows name an image that an earlier row names", "images to score are learnt from as well"
SEVERAL = "several in one cell, of which the first counts"


def told_of(
    rows: Sequence[Mapping[str, str]],
    captions: Sequence[Sequence[str]],
    labels: Mapping[str, int],
    tree: Ontology,
    *,
    is_own: bool,
) -> dict[str, dict[str, int]]:
    """What of a table is not understood, or not used: field → text → how often.

    Args:
        rows: the cells, a dict a row.
        captions: those of each row; one is used.
        labels: label texts that no list of classes explains, and how often each stands.
        tree: what the labels are nodes of.
        is_own: nobody gave a tree, so that the labels have made this one.
    """
    classes, lost = Counter[str](), Counter[str]()
    for text, times in labels.items():
        found = tree.resolve_all(text)
        strange = [node for node in found.labels if is_own and Synonyms.load().meaning(node) is None]
        classes.update(dict.fromkeys(strange, times))
        lost.update(dict.fromkeys(found.unresolved, times))
    several = sum(len(each) > 1 for each in captions)
    told = {**groups.not_understood(rows), CLASSES: dict(classes), NO_NODES: dict(lost)}
    told[CAPTIONS] = {SEVERAL: several} if several else {}
    return {field: texts for field, texts in told.items() if texts}


def lines(told: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What `told_of` found for the terminal, a line each."""
    for field, texts in told.items():
        if field == CLASSES:
            what = "labels name nothing that the table of names knows, and make classes of their own"
            yield f"{sum(texts.values()):,} {what}: {most_frequent(texts)}"
        elif field == NO_NODES:
            yield f"{sum(texts.values()):,} labels name no node: {most_frequent(texts)}"
        elif field == OUTSIDE:
            yield f"{sum(texts.values()):,} labels are of no class of the list: {most_frequent(texts)}"
        elif field == CAPTIONS:
            yield f"{sum(texts.values()):,} rows list several captions, of which the first counts"
        elif field == IMAGES:
            yield from (f"{number:,} {what}" for what, number in texts.items())
        elif field == SPLITS:
            yield from told_of_others(texts)
        else:
            yield not_understood(field, texts, "it counts as unknown")
