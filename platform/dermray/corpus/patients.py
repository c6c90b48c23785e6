"""How published tables write what is known of a patient: Fitzpatrick skin type and age."""

from __future__ import annotations

import re

ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6}
MAX_AGE_YEARS = 130
_TYPE = re.compile(r"[1-6](\.0+)?")
_AGE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(?:y|yr|yrs|years?)?(?:\s*old)?", re.I)


def skin_type(cell: str) -> int | None:
    """Fitzpatrick type ("2", "2.0", "II", "type II") as 1 to 6; None for anything else."""
    word = cell.strip().lower().removeprefix("type").strip()
    return ROMAN.get(word) or (int(float(word)) if _TYPE.fullmatch(word) else None)


def age_years(cell: str) -> float | None:
    """Age ("45", "45.0", "45 years old") in years; None for anything else."""
    match = _AGE.fullmatch(cell.strip())
    return float(match[1]) if match and float(match[1]) <= MAX_AGE_YEARS else None
