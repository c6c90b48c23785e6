"""For whom a model works: scores by skin type, sex, age, body site, source, kind of picture, and gaps of groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dermray.corpus import patients
from dermray.corpus.modality import modality
from dermray.corpus.spelling import is_placeholder
from dermray.evaluate.statistics.bootstrap import Distribution, Seed

# Dimension → the group of each sample, None where it is not known.
Groups = dict[str, list[str | None]]
# Positions among the scored samples, and a seed → scores of these samples.
Score = Callable[[np.ndarray, Seed], Mapping[str, Distribution]]

SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")
# Upper ends of the age bands, exclusive, in years.
AGE_BANDS = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (80, "60 to 79"))
OLDEST = "80 and over"
# Groups of a dimension that are shown with their size alone: thousands of sites of some samples each would be a wall.
MAX_SMALL = 100
# Columns of published tables that say it, in lower case, the first that a table has; DDI joins types: 12, 34, 56.
TABLE_COLUMNS = {
    "skin_type": ("skin_type", "fitzpatrick", "fitspatrick", "fitzpatrick_scale", "fitzpatrick_skin_type", "skin_tone"),
    "sex": ("sex", "gender"),
    "age": ("age", "age_approx", "age_years"),
    "body_site": ("body_site", "localization", "region", "anatom_site_general", "body_region"),
    "source": ("source", "dataset", "attribution"),
    "modality": ("modality", "image_type"),
}
_JOINED_TYPES = {"12": "I and II", "34": "III and IV", "56": "V and VI"}


def of_corpus(rows: Iterable[Mapping[str, Any]]) -> Groups:
    """Groups of prepared samples (`dermray.corpus.schema`) by their `skin_type`, `source`, `meta` and `modality`.

    The dimension `modality` is only there where it is known of any sample: most corpora do not say it.
    """
    groups: Groups = {name: [] for name in TABLE_COLUMNS}
    for row in rows:
        meta = row["meta"] or {}
        groups["skin_type"].append(SKIN_TYPES[row["skin_type"] - 1] if row["skin_type"] else None)
        # Corpora of earlier builds hold it as their tables wrote it.
        groups["sex"].append(patients.sex(meta.get("sex") or ""))
        groups["age"].append(age_band(meta.get("age")))
        groups["body_site"].append(_word(meta.get("body_site") or ""))
        groups["source"].append(row["source"])
        groups["modality"].append(row["modality"])
    if not any(groups["modality"]):
        del groups["modality"]
    return groups


def of_table(rows: Sequence[Mapping[str, str]]) -> Groups:
    """Groups of a raw table's rows, by the columns of `TABLE_COLUMNS` that it has."""
    columns = _columns(rows)
    return {dimension: [_READ[dimension](row[column]) for row in rows] for dimension, column in columns.items()}


def not_understood(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """By dimension, how often each text of a raw table's rows stands that says something and that no reading fits."""
    found = {}
    for dimension, column in _columns(rows).items():
        read = _READ[dimension]
        cells = Counter(" ".join(row[column].split()) for row in rows)
        strange = {cell: times for cell, times in cells.items() if not is_placeholder(cell) and read(cell) is None}
        if strange:
            found[dimension] = strange
    return found


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The column of each dimension that a table says something of."""
    names = {name.strip().lower(): name for name in (rows[0] if rows else {})}
    found = {
        dimension: next((names[name] for name in wanted if name in names), None)
        for dimension, wanted in TABLE_COLUMNS.items()
    }
    return {dimension: column for dimension, column in found.items() if column is not None}


def age_band(years: float | None) -> str | None:
    """The band of an age in years."""
    if years is None or not np.isfinite(years):
        return None
    return next((name for end, name in AGE_BANDS if years < end), OLDEST)


def breakdown(groups: Groups, rows: np.ndarray, score: Score, *, min_size: int, seed: int) -> dict[str, Any]:
    """Scores of each group of each dimension, and the gap between the best and the worst group.

    Args:
        groups: of all samples.
        rows: int64 `[N]`, the samples that are scored.
        score: of some of them, by their position in `rows`.
        min_size: a group with fewer samples is shown with its size and without a score; more than `MAX_SMALL` of them
            are counted together.
        seed: of the bootstrap; each group has resamples of its own.

    Returns:
        `min_size` and `dimensions` as docs/evaluation.md has them; a dimension with fewer than two groups is left out.
    """
    dimensions = {}
    for number, (dimension, members) in enumerate(groups.items()):
        found = _positions(members, rows)
        if len(found) < 2:
            continue
        scored: dict[str, Mapping[str, Distribution]] = {}
        listed = []
        for place, (name, positions) in enumerate(found.items()):
            if len(positions) >= min_size:
                scored[name] = score(positions, [seed, number, place])
            metrics = {key: asdict(one.metric()) for key, one in scored.get(name, {}).items()}
            listed.append({"name": name, "num_samples": len(positions), "metrics": metrics})
        dimensions[dimension] = {
            "num_unknown": len(rows) - sum(len(positions) for positions in found.values()),
            **_listed(listed, min_size),
            "gaps": gaps(scored),
        }
    return {"min_size": min_size, "dimensions": dimensions}


def _positions(members: Sequence[str | None], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Where in `rows` the samples of each known group are, int64, the groups in their order.

    Members ["face", None, "back", "face"] and rows [0, 2, 3] → {"back": [1], "face": [0, 2]}.
    """
    found: dict[str, list[int]] = {}
    for position, row in enumerate(rows.tolist()):
        name = members[row]
        if name is not None:
            found.setdefault(name, []).append(position)
    return {name: np.array(found[name], dtype=np.int64) for name in sorted(found, key=_place)}


def _listed(found: Sequence[Mapping[str, Any]], min_size: int) -> dict[str, Any]:
    """The key `groups`; of more than `MAX_SMALL` groups that are too small for a score, their number instead."""
    small = [group for group in found if group["num_samples"] < min_size]
    if len(small) <= MAX_SMALL:
        return {"groups": found}
    return {
        "groups": [group for group in found if group["num_samples"] >= min_size],
        "too_small": {"num_groups": len(small), "num_samples": sum(group["num_samples"] for group in small)},
    }


def gaps(scored: Mapping[str, Mapping[str, Distribution]]) -> dict[str, dict[str, Any]]:
    """Of each score that two groups or more have: the best and the worst group and their difference.

    The interval is that of two independent samples, the two groups being as they are. The largest of several
    differences is large by chance too, the more so the smaller the groups are.
    """
    found = {}
    for name in dict.fromkeys(name for scores in scored.values() for name in scores):
        ranked = sorted((group for group in scored if name in scored[group]), key=lambda one: scored[one][name].value)
        if len(ranked) < 2:
            continue
        worst, best = ranked[0], ranked[-1]
        difference = scored[best][name].minus(scored[worst][name]).metric()
        found[name] = {"best": best, "worst": worst, **asdict(difference)}
    return found


def _place(name: str) -> tuple[int, str]:
    """Skin types and ages in their order, everything else by the alphabet after them."""
    known = [*SKIN_TYPES, *_JOINED_TYPES.values(), *(band for _, band in AGE_BANDS), OLDEST]
    return (known.index(name) if name in known else len(known)), name


def _word(cell: str) -> str | None:
    return None if is_placeholder(cell) else cell.strip().lower()


def _skin_type(cell: str) -> str | None:
    number = patients.skin_type(cell)
    return SKIN_TYPES[number - 1] if number else _JOINED_TYPES.get(cell.strip())


_READ: dict[str, Callable[[str], str | None]] = {
    "skin_type": _skin_type,
    "sex": patients.sex,
    "age": lambda cell: age_band(patients.age_years(cell)),
    "body_site": _word,
    "source": _word,
    "modality": modality,
}
