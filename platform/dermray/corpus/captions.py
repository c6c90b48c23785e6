"""Caption aspects of a sample and how each is made.

`raw` is what the source says, `ontology` names the diagnosis with its path in the disease tree, `concept` names the
visible features; the sentences are those of Derm1M (arXiv 2503.14911). `sub` are the sentences of a raw caption, at
most eight, as MAKE (arXiv 2505.09372) trains on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.corpus.spelling import is_placeholder

ONTOLOGY_TEMPLATE = "This is a skin photo diagnosed as {}."
CONCEPT_TEMPLATE = "This skin photo shows {}."

MAX_SUB_CAPTIONS = 8

Caption = tuple[CaptionAspect, str]

# A mark that may end a sentence, what closes after it, and the gap; Chinese marks need no gap.
_END = re.compile(
    r"(?<![.!?\u2026])(?P<mark>[.!?\u2026]+)[\"'\u201d\u2019)\]]*(?P<gap>\s+)|[\u3002\uff01\uff1f]+[\u201d\u2019\uff09]*\s*"
)
_NEXT_WORD = re.compile(r"[\"'\u201c\u2018(\[]*(?P<word>[^\W_]+)")
_WORDY = re.compile(r"[^\W\d_]{2}|[\u3400-\u9fff]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is never the last word of a sentence: it introduces what follows.
_INTRODUCE = _words(
    "dr drs mr mrs ms prof st fig figs tab ref refs eq no nos p pp vol ed eds e.g eg i.e ie cf vs v viz approx ca "
    "circa incl esp resp"
)
# What is the last word of a sentence only now and then: units, doses, Latin, places of the body.
_ABBREVIATE = _words(
    "cm mm m km g kg mg mcg ug µg μg ml dl l iu u min sec hr hrs h wk wks mo mos yr yrs y.o yo i.v iv i.m im s.c "
    "sc p.o po i.d b.i.d bid t.i.d tid q.i.d qid q.d qd q.h prn p.r.n temp al etc sp spp subsp var jr sr dept inc "
    "max ant post lat med inf sup dist prox ext int bilat dx hx tx rx a.m am p.m pm u.s u.k m.d md ph.d phd"
)
# Words that begin a sentence even after an abbreviation.
_STARTERS = _words(
    "a an the this that these those there it its he she his her they their we our in on at after before when "
    "while however both all some most many no patient patients treatment diagnosis biopsy histology"
)


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


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, white space collapsed; every other character is in one of them.

    English by full stops, question and exclamation marks before a gap, Chinese by its own marks. Abbreviations
    ("Dr.", "e.g.", "2 cm.", "i.v.", "Fig. 3", "S. aureus"), numbers and numbering ("1. ") end no sentence.
    """
    text = " ".join(text.split())
    found: list[str] = []
    start = 0
    for match in _END.finditer(text):
        before = text[start : match.start()]
        if _WORDY.search(before) and _ends_sentence(before, match["mark"], text[match.end() :]):
            found.append(text[start : match.end()].strip())
            start = match.end()
    found.append(text[start:])
    # What is left without a word (a number, a bracket) belongs to the sentence before it.
    if len(found) > 1 and not _WORDY.search(found[-1]):
        last = found.pop()
        found[-1] = f"{found[-1]} {last}".strip()
    return [sentence for sentence in found if sentence]


def _ends_sentence(before: str, mark: str | None, after: str) -> bool:
    if mark is None or not after:
        return True
    following = _NEXT_WORD.match(after)
    if mark != ".":
        return following is None or mark != "..." or not following["word"][0].islower()
    if following is None:
        return False
    word = following["word"]
    abbreviation = before.rpartition(" ")[2].rpartition("/")[2].lstrip("([\"'\u201c\u2018").casefold()
    if word[0].islower() or abbreviation in _INTRODUCE:
        return False
    if abbreviation in _ABBREVIATE or len(abbreviation) == 1:
        return word.casefold() in _STARTERS
    return True


def sub_captions(text: str, limit: int = MAX_SUB_CAPTIONS) -> list[str]:
    """The first sentences of a raw caption, each once, at most `limit`; a trailing "None" says nothing."""
    said = (sentence for sentence in sentences(text) if not is_placeholder(sentence.strip(" .")))
    return list(dict.fromkeys(said))[:limit]


def diagnosis_path(labels: Iterable[str], ontology: Ontology) -> list[str]:
    """Names for `ontology_caption`: the ancestors that several labels share come once, then each label.

    Only ancestors that hold on every path of a label are named, and of synonyms the first, in lower case.
    """
    nodes = dict.fromkeys(node for label in labels for node in ontology.path(label))
    return [ontology.synonyms(node)[0].lower() for node in nodes]


def distinct(captions: Iterable[Caption]) -> list[Caption]:
    """Captions in order, each once; blank ones left out."""
    return list(dict.fromkeys((aspect, text) for aspect, text in captions if text.strip()))
