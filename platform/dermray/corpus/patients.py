"""How tables write what is known of a patient: Fitzpatrick skin type, age and sex. One reading for every job.

Published data sets and clinics write the same fact in many ways (`FST3`, `AGE_30_TO_39`, `45 yo`, `woman`). What is
not understood is None here; callers keep it as it was written and count it.
"""

from __future__ import annotations

import re

ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6}
MAX_AGE_YEARS = 130
UNITS_PER_YEAR = {"y": 1.0, "m": 12.0, "w": 52.18, "d": 365.25}
SEXES = {
    **dict.fromkeys(("female", "f", "fem", "woman", "women", "girl", "lady"), "female"),
    **dict.fromkeys(("male", "m", "man", "men", "boy", "gentleman"), "male"),
    **dict.fromkeys(("other", "intersex", "non binary", "nonbinary", "diverse"), "other"),
}
# Between two numbers, or two Roman ones: `I/II` says two types and is not `III`, `4 5` and `1/2` are no 45 and no 12.
_BETWEEN = re.compile(r"(?<=[0-9iv])(?:\.?[\s_/:]+|(?<=[iv])\.)(?=[0-9iv])")
_TYPE = re.compile(
    r"(?:(?:fst|fitzpatrick|fitspatrick|fitz|skin|photo|type|scale)+(?:-(?=[iv]))?)?(?P<type>[1-6](?:\.0+)?|iv|vi?|i{1,3})"
)
# `45,5` is a number of the continent's; `1,234` may be a thousand and is none.
_NUMBER = r"[0-9]{1,3}(?:\.[0-9]+|,[0-9]{1,2})?"
_UNIT = r"(?P<unit>y|yr|yrs|years?|yo|mos?|mths?|months?|wks?|weeks?|days?)"
_AGE = re.compile(rf"(?P<age>{_NUMBER})(?:{_UNIT})?(?:s?old|ofage|o)?")
_YEARS = r"(?:y|yrs?|years?|yo)?(?:old)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})(?:-|to)(?P<high>{_NUMBER}){_YEARS}")
_FROM = re.compile(
    rf"(?:(?:>=?|≥|over|above)(?P<over>{_NUMBER})|(?P<plus>{_NUMBER})(?:\+|(?:or|and)(?:over|older|above))){_YEARS}"
)


def skin_type(cell: str) -> int | None:
    """Fitzpatrick type ("2", "2.0", "II", "type II", "FST3", "FST-III", "Fitzpatrick 2") as 1 to 6; else None."""
    match = _TYPE.fullmatch(_squeezed(cell))
    if match is None:
        return None
    word = match["type"]
    return ROMAN.get(word) or int(float(word))


def age_years(cell: str) -> float | None:
    """Age in years; None for anything else.

    "45", "45.0", "45 years old", "45 yo" and "6 months" (0.5) are as they say. A range ("45-49", "AGE_30_TO_39") is
    its middle, an open one ("85+") its lower end: see `is_age_range`.
    """
    word = _squeezed(cell).removeprefix("age")
    if match := _AGE.fullmatch(word):
        years = _float(match["age"]) / UNITS_PER_YEAR[(match["unit"] or "y")[0]]
    elif match := _RANGE.fullmatch(word):
        low, high = _float(match["low"]), _float(match["high"])
        years = (low + high) / 2 if low <= high else -1.0
    elif match := _FROM.fullmatch(word):
        years = _float(match["over"] or match["plus"])
    else:
        return None
    return years if 0 <= years <= MAX_AGE_YEARS else None


def is_age_range(cell: str) -> bool:
    """True for an age that is written as a range, closed or open, so that one number does not tell all of it."""
    word = _squeezed(cell).removeprefix("age")
    return bool(_RANGE.fullmatch(word) or _FROM.fullmatch(word)) and age_years(cell) is not None


def sex(cell: str) -> str | None:
    """`female`, `male` or `other`; None for anything else."""
    return SEXES.get(" ".join(cell.lower().replace("-", " ").replace("_", " ").split()).rstrip("."))


def _squeezed(cell: str) -> str:
    """In lower case without white space, `_`, `/` and dots after letters; every dash is one, two numbers are two."""
    word = re.sub(r"[\s_/:]+", "", _BETWEEN.sub("|", cell.lower())).replace("\u2013", "-").replace("\u2014", "-")
    return re.sub(r"(?<=[a-z])\.", "", word)


def _float(text: str) -> float:
    return float(text.replace(",", "."))
