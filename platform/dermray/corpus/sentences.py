"""A text parted where a person would part it: into sentences, and the lines and items of lists.

By rule, for English as captions and forum posts have it, and for Chinese by its own marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# To be raised when these rules part some text elsewhere than before.
RULES = 3

# A mark that may end a sentence, what closes after it, and the gap; Chinese marks need no gap.
_END = re.compile(
    r"(?<![.!?\u2026])(?P<mark>[.!?\u2026]+)(?P<close>[\"'\u201d\u2019)\]]*)\s+"
    # Where the gap was forgotten: "on the nose.The border".
    r"|(?P<gapless>(?:(?<=[a-z]{3})|(?<=\d [cm]m))\.|(?<=[a-z])[!?]+)(?=[A-Z][a-z]*(?:[\s:,]|$))"
    r"|[\u3002\uff01\uff1f]+[\u201d\u2019\uff09]*\s*"
)
_NEXT_WORD = re.compile(r"(?:[\u2022\u25aa\u25cf\u25e6\u2023*\u2013\u2014-]+ )?[\"'\u201c\u2018(\[]*(?P<word>[^\W_]+)")
_NAME = re.compile(r"[./@\\]")
_WORDY = re.compile(r"[^\W\d_]{2}|[\u3400-\u9fff]")
_BULLET = re.compile(r"(?<=[^\s:]) (?=[\u2022\u25aa\u25cf\u25e6\u2023] ?\S)")
_NUMBER = re.compile(r"(?:^|(?P<gap> ))(?P<open>\(?)(?P<number>[0-9]{1,2})(?P<close>[.)]) (?=\S)")
# What a list begins after, if not with the text.
_BEFORE_LIST = (".", "!", "?", ":", ";")
_ITEM = re.compile(r"[\u2022\u25aa\u25cf\u25e6\u2023*\u2013\u2014-] ?\S|\(?(?:[0-9]{1,2}[.)]|[a-z]\)) ")
_LEADING_BULLET = re.compile(r"[\u2022\u25aa\u25cf\u25e6\u2023] ?|[*\u2013\u2014-] ")
_QUOTES = frozenset("\"'\u201d\u2019")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is never the last word of a sentence: it introduces what follows.
_INTRODUCE = _words(
    "dr drs mr mrs ms prof st fig figs tab ref refs eq p pp vol ed eds e.g eg i.e ie cf vs v viz approx ca "
    "circa incl esp resp"
)
# What is the last word of a sentence only now and then: units, doses, Latin, places of the body.
_ABBREVIATE = _words(
    "cm mm m km g kg mg mcg ug \u00b5g \u03bcg ml dl l iu u min sec hr hrs h wk wks mo mos yr yrs y.o yo i.v iv i.m "
    "im s.c sc p.o po i.d b.i.d bid t.i.d tid q.i.d qid q.d qd q.h prn p.r.n temp al etc sp spp subsp var jr sr dept "
    "inc max ant post lat med inf sup dist prox ext int bilat dx hx tx rx a.m am p.m pm u.s u.k m.d md ph.d phd"
)
# Of these, what ends a sentence wherever the next word is written large.
_MEASURES = _words("cm mm km kg mg mcg ml dl min sec hr hrs wk wks mo mos yr yrs a.m am p.m pm etc")
# Words that begin a sentence even after an abbreviation.
_STARTERS = _words(
    "a an the this that these those there it its he she his her they their we our in on at after before when "
    "while however both all some most many no patient patients treatment diagnosis biopsy histology"
)
# And those that begin one in small letters, where somebody writes as people talk.
_STARTERS_OF_TALK = _STARTERS | _words(
    "i i'm i've my any what where why how is are does do did have has can could should would also thanks thank please "
    "anyone but so then now you your"
)
# After these a letter is a name of its own, and no initial.
_LETTERED = _words("vitamin hepatitis type grade group stage class panel figure phase category level hemophilia case")
# What no line ends with that goes on in the next one.
_OPEN = _words("the a an of in and with by at on for to or from as is are was were de la von van")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, white space collapsed; every other character is in one of them.

    English by full stops, question and exclamation marks before a gap, Chinese by its own marks; and by bullets,
    numbers of a list that begins with 1, blank lines, and lines that begin anew. Abbreviations ("Dr.", "e.g.", "2 cm.",
    "i.v.", "Fig. 3", "S. aureus"), numbers, numbering ("1. "), "\u2026" and '"Why?" he asked' end no sentence.
    """
    found: list[list[str]] = []
    is_worded = False
    for part in (part for line in _lines(text) for item in _items(line) for part in _sentences(item)):
        # What has no word (a number, a bracket) belongs to its neighbour, the one before it if there is one.
        has_word = _WORDY.search(part) is not None
        if found and not (has_word and is_worded):
            found[-1].append(part)
            is_worded |= has_word
        else:
            found.append([part])
            is_worded = has_word
    return [" ".join(parts) for parts in found]


def without_bullet(sentence: str) -> str:
    """A sentence without the bullet that it begins with."""
    return _LEADING_BULLET.sub("", sentence, count=1) if _LEADING_BULLET.match(sentence) else sentence


def _lines(text: str) -> Iterator[str]:
    """The lines that begin anew, white space collapsed; one that only goes on is part of the one before it."""
    begun: list[str] = []
    is_apart = False
    for line in (" ".join(each.split()) for each in text.splitlines()):
        if line and begun and (is_apart or _begins_anew(begun[-1], line)):
            yield " ".join(begun)
            begun = []
        is_apart = not line
        if line:
            begun.append(line)
    if begun:
        yield " ".join(begun)


def _begins_anew(before: str, line: str) -> bool:
    if _ITEM.match(line):
        return True
    following = _NEXT_WORD.match(line)
    last = before.rpartition(" ")[2].casefold()
    goes_on = before.endswith((",", ";", "(", "-", "\u2013")) or last in _OPEN or last.rstrip(".") in _INTRODUCE
    return following is not None and not following["word"][0].islower() and not goes_on


def _items(line: str) -> Iterator[str]:
    """A line before each bullet, and before the numbers 2, 3, \u2026 of a list, parted."""
    cuts = {match.start() for match in _BULLET.finditer(line)}
    last, style = 0, ("", "")
    for match in _NUMBER.finditer(line):
        number, of_style = int(match["number"]), (match["open"], match["close"])
        if number == 1 and (not match["gap"] or line.endswith(_BEFORE_LIST, 0, match.start())):
            last, style = 1, of_style
        elif last and number == last + 1 and of_style == style:
            last = number
            cuts.add(match.start())
    start = 0
    for cut in sorted(cuts):
        yield line[start:cut]
        start = cut + 1
    yield line[start:]


def _sentences(text: str) -> Iterator[str]:
    start = 0
    word = _WORDY.search(text)
    for match in _END.finditer(text):
        if word is None or word.end() > match.start():
            continue
        before = text[start : match.start()]
        # A dot in an address or a file's name is none of a forgotten gap.
        is_name = match["gapless"] and _NAME.search(before.rpartition(" ")[2])
        if not is_name and _ends_sentence(before, match["mark"], match["close"], text, match.end()):
            yield text[start : match.end()].strip()
            start = match.end()
            word = _WORDY.search(text, start)
    if text[start:].strip():
        yield text[start:].strip()


def _ends_sentence(before: str, mark: str | None, close: str | None, text: str, end: int) -> bool:
    """Whether a sentence ends with a mark; `before` is what it would end, and the next one begins at `end`."""
    if mark is None or end == len(text):
        return True
    following = _NEXT_WORD.match(text, end)
    if following is None:
        return mark != "."
    word = following["word"]
    is_lower = word[0].islower()
    if mark != ".":
        is_talk = bool(close and _QUOTES.intersection(close)) or set(mark) <= {".", "\u2026"}
        return not (is_talk and is_lower)
    above, _, last = before.rpartition(" ")
    abbreviation = last.rpartition("/")[2].lstrip("([\"'\u201c\u2018").casefold()
    if abbreviation in _INTRODUCE or (abbreviation in ("no", "nos") and word[0].isdigit()):
        return False
    if is_lower:
        is_known = abbreviation in _ABBREVIATE or not abbreviation.isalpha() or len(abbreviation) < 3
        return not is_known and word in _STARTERS_OF_TALK
    if last.isupper() and above.rpartition(" ")[2].casefold() in _LETTERED:
        return True
    if len(abbreviation) == 1 and abbreviation.isalpha():
        # Two initials: "J. A. Smith".
        if len(word) == 1 and text.startswith(".", following.end()):
            return False
        return word.casefold() in _STARTERS or above.rpartition(" ")[2].casefold() in _LETTERED
    is_end = abbreviation not in _ABBREVIATE or abbreviation in _MEASURES
    return is_end or word.casefold() in _STARTERS
