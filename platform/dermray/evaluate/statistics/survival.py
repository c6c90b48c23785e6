"""How long until an event, where for some observation ended before it: survival curves and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dermray.errors import EvaluationError

# Of the 95 % interval.
_QUANTILE = 1.959963984540054


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """A step function by Kaplan and Meier; every array is `[T]`, one value for each distinct time, the first of them 0.

    Attributes:
        times: float64, ascending.
        survival: share that is still free of the event after that time.
        low, high: its 95 % interval, by Greenwood's variance on the scale of log(-log S). Both are 1 before the first
            event; where nobody is left, the variance is infinite and both are 0.
        at_risk: int64, those observed just before that time.
        events: int64, events at it.
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray
    events: np.ndarray

    @property
    def median(self) -> float:
        """The first time by which half have had the event; infinite where observation ended before."""
        reached = np.flatnonzero(self.survival <= 0.5)
        return float(self.times[reached[0]]) if len(reached) else float("inf")


def kaplan_meier(time: Any, event: Any) -> SurvivalCurve:
    """The survival curve of those observed (Kaplan and Meier, 1958).

    Times `[1, 2, 2]`, the last one without its event: after 1 two thirds survive, after 2 one third.

    Args:
        time: `[N]`, to the event or to the end of observation, 0 or more.
        event: `[N]`, 1 or true where the event was seen.

    Raises:
        EvaluationError: nobody, arrays of other shapes, times that are negative or not finite, events but 0 and 1.
    """
    times, seen = observed(time, event)
    at, at_risk, events = _table(times, seen, starts=(0.0,))
    with np.errstate(divide="ignore", invalid="ignore"):
        survival = np.cumprod(1.0 - events / at_risk)
        variance = np.cumsum(events / (at_risk * (at_risk - events)))
        log_survival = np.log(survival)
        spread = _QUANTILE * np.sqrt(variance) / np.abs(log_survival)
        low, high = (np.exp(-np.exp(np.log(-log_survival) + sign * spread)) for sign in (1, -1))
    for bound in (low, high):
        bound[survival == 1.0] = 1.0
        bound[survival == 0.0] = 0.0
    return SurvivalCurve(at, survival, low, high, at_risk, events)


def log_rank(time: Any, event: Any, group: Any) -> tuple[float, float]:
    """Whether groups differ in their times to the event (Mantel, 1966): the statistic and its p-value.

    Args:
        time: `[N]`, as of `kaplan_meier`.
        event: `[N]`.
        group: `[N]`, any labels, two different ones or more.

    Returns:
        chi² with one degree of freedom less than there are groups, and the chance of so much where they do not differ.

    Raises:
        EvaluationError: as `kaplan_meier`, fewer than two groups, or no event.
    """
    from scipy.stats import chi2

    times, seen = observed(time, event)
    labels, membership = np.unique(np.asarray(group), return_inverse=True)
    if membership.shape != times.shape or len(labels) < 2:
        raise EvaluationError(
            f"a log-rank test needs the group of each of {len(times)} and two groups; here are {len(membership)} and "
            f"{len(labels)}"
        )
    if not seen.any():
        raise EvaluationError("a log-rank test needs an event; here observation ended before any")
    at, at_risk, events = _table(times, seen)
    each = [_on(at, times[membership == k], seen[membership == k]) for k in range(len(labels))]
    shares = np.stack([mine / at_risk for mine, _ in each])
    excess = np.array([happened.sum() for _, happened in each]) - (shares * events).sum(axis=1)
    # Of those at risk some are drawn without replacement; of a single one there is nothing to draw.
    spread = events * (at_risk - events) / np.maximum(at_risk - 1, 1)
    covariance = np.diag((shares * spread).sum(axis=1)) - (shares * spread) @ shares.T
    # The groups' excesses sum to 0, so that the last one says nothing new.
    kept = slice(len(labels) - 1)
    statistic = float(excess[kept] @ np.linalg.pinv(covariance[kept, kept]) @ excess[kept])
    return statistic, float(chi2.sf(statistic, len(labels) - 1))


def censoring_survival(times: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Share of those observed beyond each one's time, that time included, float64 `[N]`; events happen first.

    The survival curve of the ends of observation, by which samples are weighted (inverse probability of censoring).
    """
    at, at_risk, events = _table(times, seen)
    ends = np.bincount(np.searchsorted(at, times), minlength=len(at)) - events
    curve = np.cumprod(1.0 - ends / np.maximum(at_risk - events, 1))
    return curve[np.searchsorted(at, times)]


def observed(time: Any, event: Any) -> tuple[np.ndarray, np.ndarray]:
    """Times as float64 and events as bool, both `[N]`.

    Raises:
        EvaluationError: as `kaplan_meier`.
    """
    times, seen = np.asarray(time, dtype=np.float64), np.asarray(event)
    if times.ndim != 1 or times.shape != seen.shape or not len(times):
        raise EvaluationError(
            f"times and events must have one shape [N], not {list(times.shape)} and {list(seen.shape)}"
        )
    for what, values, wrong in (
        ("time", times, ~(np.isfinite(times) & (times >= 0))),
        ("event", seen, (seen != 0) & (seen != 1)),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise EvaluationError(
                f"{what} {values[row]} of row {row}: times must be finite and 0 or more, events 0 or 1; mend the table"
            )
    return times, seen.astype(bool)


def _table(
    times: np.ndarray, seen: np.ndarray, *, starts: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct times, how many are observed just before each, and how many events happen at it."""
    at = np.unique(np.concatenate([starts, times]))
    return at, *_on(at, times, seen)


def _on(at: np.ndarray, times: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At risk and events at given times, int64 `[T]`."""
    at_risk = len(times) - np.searchsorted(np.sort(times), at, side="left")
    events = np.bincount(np.searchsorted(at, times[seen]), minlength=len(at))
    return at_risk.astype(np.int64), events.astype(np.int64)
