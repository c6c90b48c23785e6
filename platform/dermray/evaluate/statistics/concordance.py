"""Whether those with the higher score have the event earlier: shares of pairs in the right order.

A pair can be compared where the one whose event is seen has the earlier time; a sample whose observation ended at that
very time counts as later. Scores are equal only where they are exactly so; such pairs count half.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.statistics.survival import censoring_survival, kaplan_meier, observed


def harrell_c(time: Any, event: Any, score: Any) -> float:
    """Harrell's concordance (1982): the share of comparable pairs in which the earlier event has the higher score.

    Counted in n log n steps. Times `[1, 2, 3]`, all with events, and scores `[3, 1, 2]`: two of three pairs, 2/3.

    Args:
        time: `[N]`, to the event or to the end of observation.
        event: `[N]`, 1 or true where the event was seen.
        score: `[N]`, higher for an earlier event.

    Raises:
        EvaluationError: arrays of other shapes, values that are none, or no pair that can be compared.
    """
    times, seen, scores = _checked(time, event, score)
    return _concordance(times, seen, scores, np.ones(len(times)))


def uno_c(time: Any, event: Any, score: Any, *, tau: float | None = None) -> float:
    """Uno's concordance (2011): as `harrell_c`, each pair weighted by how unlikely it was to be observed so far.

    The weight is the inverse square of the chance that observation lasts beyond the event, estimated from the same
    samples. Unlike Harrell's, its limit does not depend on how observation ended.

    Args:
        time: `[N]`.
        event: `[N]`.
        score: `[N]`.
        tau: only events before this time begin a pair; None for all.

    Raises:
        EvaluationError: as `harrell_c`, or an event at a time up to which nobody's observation can last.
    """
    times, seen, scores = _checked(time, event, score)
    counted = seen if tau is None else seen & (times < tau)
    return _concordance(times, seen, scores, _inverse_chance(times, seen, counted) ** 2)


def dynamic_auc(time: Any, event: Any, score: Any, times: Any) -> np.ndarray:
    """Area under the ROC curve of having had the event by each time, float64 `[T]` (cumulative/dynamic; Uno, 2007).

    Cases had the event at or before the time, each by the inverse of the chance to have been observed so far;
    controls are observed beyond it.

    Args:
        time: `[N]`.
        event: `[N]`.
        score: `[N]`, higher for an earlier event.
        times: `[T]`, when to look.

    Raises:
        EvaluationError: as `uno_c`, or a time without a case or without a control.
    """
    observed_until, seen, scores = _checked(time, event, score)
    moments = np.atleast_1d(np.asarray(times, dtype=np.float64))
    weights = _inverse_chance(observed_until, seen, seen & (observed_until <= moments.max(initial=-np.inf)))
    return np.array([_auc_at(moment, observed_until, seen, scores, weights) for moment in moments])


def mean_dynamic_auc(time: Any, event: Any, score: Any, times: Any) -> float:
    """`dynamic_auc` over ascending times as one figure, each by the share of events since the time before it.

    Raises:
        EvaluationError: as `dynamic_auc`.
    """
    moments = np.sort(np.atleast_1d(np.asarray(times, dtype=np.float64)))
    areas = dynamic_auc(time, event, score, moments)
    curve = kaplan_meier(time, event)
    survival = curve.survival[np.searchsorted(curve.times, moments, side="right") - 1]
    drops = -np.diff(survival, prepend=1.0)
    return float(areas @ drops / drops.sum())


def _auc_at(moment: float, times: np.ndarray, seen: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    cases, controls = seen & (times <= moment), np.sort(scores[times > moment])
    if not cases.any() or not len(controls):
        raise EvaluationError(
            f"at time {moment} there are {int(cases.sum())} with the event and {len(controls)} observed beyond it; an "
            "AUC needs both: choose times between"
        )
    below, not_above = (np.searchsorted(controls, scores[cases], side=side) for side in ("left", "right"))
    return float(weights[cases] @ (below + not_above) / (2.0 * weights[cases].sum() * len(controls)))


def _concordance(times: np.ndarray, seen: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Weighted share of comparable pairs in the right order; a weight is that of a pair's earlier sample, `[N]`."""
    # Whoever comes later in this key can be compared with an event: at one time events are first, and equal.
    key = 2 * np.unique(times, return_inverse=True)[1] + ~seen
    order = np.argsort(-key, kind="stable")
    num_later = np.searchsorted(-key[order], -key[seen], side="left")
    ranks = np.unique(scores, return_inverse=True)[1]
    lower = _count_below(ranks[order], num_later, ranks[seen])
    not_higher = _count_below(ranks[order], num_later, ranks[seen] + 1)
    total = weights[seen] @ num_later
    if not total > 0:
        raise EvaluationError("no two samples can be compared: nobody is observed beyond an event that counts")
    return float(weights[seen] @ (lower + not_higher) / (2.0 * total))


def _count_below(values: np.ndarray, ends: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many of `values[:end]` are below `limit`, for many ends and limits at once, int64 `[Q]`.

    A wavelet matrix (Claude and Navarro, 2012): bit by bit the values are parted, zeros before ones, and every
    query follows its limit's bit. Values `[2, 0, 1]`, end 2 and limit 2: one, the 0.
    """
    first, last = np.zeros_like(ends), ends.copy()
    found = np.zeros(len(ends), dtype=np.int64)
    for bit in reversed(range(int(values.max(initial=0) + 1).bit_length())):
        ones = (values >> bit) & 1
        zeros_before = np.concatenate([[0], np.cumsum(1 - ones)])
        num_zeros, up = zeros_before[-1], (limits >> bit) & 1 == 1
        found += np.where(up, zeros_before[last] - zeros_before[first], 0)
        first, last = (
            np.where(up, num_zeros + edge - zeros_before[edge], zeros_before[edge]) for edge in (first, last)
        )
        values = np.concatenate([values[ones == 0], values[ones == 1]])
    return found


def _inverse_chance(times: np.ndarray, seen: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """One over the chance to be observed beyond each time, `[N]`; 0 where not counted."""
    chance = censoring_survival(times, seen)
    if (lost := counted & (chance == 0)).any():
        raise EvaluationError(
            f"no observation lasts beyond time {times[lost].min()}, at which there is an event: its weight would be "
            "infinite; look at earlier times (tau)"
        )
    return np.divide(1.0, chance, out=np.zeros(len(times)), where=counted)


def _checked(time: Any, event: Any, score: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    times, seen = observed(time, event)
    scores = np.asarray(score, dtype=np.float64)
    if scores.shape != times.shape or not np.isfinite(scores).all():
        raise EvaluationError(f"each of {len(times)} samples needs a finite score; here {list(scores.shape)}")
    return times, seen, scores
