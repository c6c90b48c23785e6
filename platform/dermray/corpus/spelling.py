"""One folding of labels for every job: what is spelled alike, and which cells of a table say nothing."""

from __future__ import annotations

import re
import unicodedata

_APOSTROPHES = re.compile("['`\u00b4\u2018\u2019\u02bc]")
# White space, hyphens, dashes and underscores.
_GAPS = re.compile(r"[\s\-\u2010\u2011\u2013_]+")
# Two numbers stay two: grade 1-2 is not grade 12.
_JOINED = re.compile("(?<![0-9])[ ,]+|[ ,]+(?![0-9])")
_COMMAS = re.compile(r"\s*,[\s,]*")
_NUMBER = re.compile(r"(?P<sign>-?)(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?")
# Between the letters of an abbreviation: b.c.c. is bcc.
_DOTS = re.compile(r"(?<=\b[a-z])\.(?=[a-z]\b)")
# Endings that the -s of a plural does not belong to (pityriasis, lupus, moss).
_NOT_PLURAL = ("ss", "us", "is")
# British spelling → American, on both sides of a comparison, so that what matters is only what becomes alike.
_AMERICAN = (
    (re.compile("[ao]e|[\u00e6\u0153]"), "e"),
    (re.compile(r"ageing"), "aging"),
    (re.compile(r"(?<=col|tum|vap)our"), "or"),
    (re.compile(r"is(?=ations?\b|ed\b|ing\b)"), "iz"),
    (re.compile(r"(cent|fib)re\b"), r"\1er"),
    (re.compile(r"sulph"), "sulf"),
    (re.compile(r"leuc(?=o)"), "leuk"),
    (re.compile(r"grey"), "gray"),
    (re.compile(r"(?<=\bm)ould"), "old"),
)
# What tables put where there is nothing to say. -1 is the class of rows without one in tables of numbers.
_PLACEHOLDER = re.compile(
    r"(no (\w+ )*(information|concepts)|no (definitive )?diagnosis|\(?none\)?|nan|nat|null|nil|#?n[./]?a\.?|n[./]k\.?"
    r"|<na>|<?\(?null\)?>?|\(blank\)|\\n|#(ref!|value!|name\?|div/0!|null!|num!)"
    r"|unk|unknown|undefined|unspecified|missing|blank|not (available|applicable|specified|recorded|known)"
    r"|-1(\.0+)?|[-?.\u2013\u2014]+)?",
    re.IGNORECASE,
)
# What says of the disease named behind it, or before it, that it is not there, or asks whether it is.
_DENIES_NEXT = (
    r"no|not|never|nor|neither|without|exclud(?:e|es|ed|ing)|exclusion|rul(?:e|es|ing)[ -]?out|r/o|negative"
    r"|absen(?:ce|t)|free|query|possibl[ey]|probabl[ey]|likely|suspect(?:ed)?|suspicious|suspicion|questionable|differential|ddx|d/d"
    r"|versus|vs|or|history|hx|h/o"
)
_DENIES_LAST = (
    r"excluded|ruled[ -]?out|r/o|unlikely|likely|possible|probable|absent|negative|suspected|suspicion|questionable"
    r"|denied|versus|vs|or|not (?:seen|found|present|confirmed|likely)|unconfirmed"
)
_DENIED_BEFORE = re.compile(rf"(?<![\w-])(?:{_DENIES_NEXT})(?![\w-])|\?")
_DENIED_BEHIND = re.compile(rf"(?<![\w-])(?:{_DENIES_LAST})(?![\w-])|\?")
_DENIAL = re.compile(
    rf"(?:(?:{_DENIES_NEXT}|{_DENIES_LAST}|(?:(?:to|be|is|was|been|has|seen|found|present|confirmed|clinically"
    rf"|histologically|histology|biopsy|on|by|of|for)))(?![\w-])|\?|[\s.!()-])+"
)


def denies(before: str, behind: str) -> bool:
    """Whether what stands around a disease's name says that it is not that disease, or asks whether it is.

    `no melanoma`, `rule out melanoma`, `?melanoma`, `melanoma excluded`; not `melanoma, no ulceration`.
    """
    return bool(_DENIED_BEFORE.search(before.lower()) or _DENIED_BEHIND.search(behind.lower()))


def is_denial(text: str) -> bool:
    """Whether a text names nothing and only denies or asks (`excluded`, `to be ruled out`, `?`)."""
    plain = text.strip().lower()
    return _DENIAL.fullmatch(plain) is not None and denies(plain, plain)


def is_placeholder(text: str) -> bool:
    """True for a cell that says nothing: blank, or what tables put there ("nan", "N/A", "unknown", "-1", …)."""
    return _PLACEHOLDER.fullmatch(_visible(text).strip()) is not None


def key(text: str) -> str:
    """Case, Unicode form and width, apostrophes, hyphens, spaces and the dots of abbreviations made alike.

    Characters that nobody sees (a byte order mark, a soft hyphen) are left out; 1, 01 and 1.0 are one number.
    """
    text = unicodedata.normalize("NFKC", _APOSTROPHES.sub("", _visible(text))).casefold()
    return _number(text.strip()) or _COMMAS.sub(", ", _GAPS.sub(" ", _DOTS.sub("", text))).strip(" ,.")


def _number(text: str) -> str | None:
    """A number in its shortest form, its sign being no hyphen; None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["fraction"]):
        return None
    fraction = (match["fraction"] or "").rstrip("0")
    return match["sign"] + (match["whole"].lstrip("0") or "0") + (f".{fraction}" if fraction else "")


def _visible(text: str) -> str:
    """Without the characters that only steer how a text is laid out, and the NULs of columns of a fixed width."""
    if text.isascii() and "\0" not in text:
        return text
    return "".join(letter for letter in text if letter != "\0" and unicodedata.category(letter) != "Cf")


def singular(text_key: str) -> str:
    """Each word of a key without its plural ending, English or Latin (scars, biopsies, keratoses, nevi, bullae)."""
    return " ".join(_singular_word(word) for word in text_key.split(" "))


def _singular_word(word: str) -> str:
    stem = word.rstrip(",")
    if len(stem) > 4 and stem.endswith("ies"):
        return stem[:-3] + "y"
    if len(stem) > 5 and stem.endswith("oses"):
        return stem[:-2] + "is"
    if len(stem) > 5 and stem.endswith(("ses", "xes", "ches", "shes")):
        return stem[:-2]
    if len(stem) > 3 and stem.endswith("ae"):
        return stem[:-1]
    if len(stem) > 3 and stem.endswith("i"):
        return stem[:-1] + "us"
    if len(stem) > 3 and stem.endswith("s") and not stem.endswith(_NOT_PLURAL):
        return stem[:-1]
    return stem


def spelling(text_key: str, *, joined: bool = True) -> str:
    """A key in the singular, without accents, in American spelling; `joined`: also without spaces and commas."""
    plain = unicodedata.normalize("NFKD", singular(text_key))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    for british, american in _AMERICAN:
        plain = british.sub(american, plain)
    return _JOINED.sub("", plain) if joined else plain
