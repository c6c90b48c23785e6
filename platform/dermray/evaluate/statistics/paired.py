"""Scores of two models on the very same resamples, and whether they lie apart by more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dermray import scales
from dermray.evaluate.statistics.bootstrap import Distribution, Metric

# Of a score without a report.
NOTHING_SAID: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Difference:
    """One score of two models on the same samples.

    Attributes:
        baseline, candidate: its value for each.
        difference: candidate minus baseline, with its 95 % interval.
        p_value: two-sided, of no difference (`Distribution.p_value`); None without resamples.
    """

    baseline: float
    candidate: float
    difference: Metric
    p_value: float | None

    def is_better(self, name: str, score: Mapping[str, Any] = NOTHING_SAID, *, level: float = 0.05) -> bool:
        """Whether the candidate is better in the score of that name, and not by chance at this level.

        `score` is what a report says of it (`dermray.scales.of`).
        """
        return self._towards(name, score, level) > 0

    def is_worse(self, name: str, score: Mapping[str, Any] = NOTHING_SAID, *, level: float = 0.05) -> bool:
        """Whether the candidate is worse, as `is_better`."""
        return self._towards(name, score, level) < 0

    def _towards(self, name: str, score: Mapping[str, Any], level: float) -> float:
        if self.p_value is None or self.p_value > level:
            return 0.0
        return -self.difference.value if scales.of(name, score).lower_is_better else self.difference.value


def differences(baseline: Mapping[str, Distribution], candidate: Mapping[str, Distribution]) -> dict[str, Difference]:
    """Every score of the baseline beside the candidate's, over the same samples and resamples."""
    found = {}
    for name, before in baseline.items():
        after = candidate[name]
        difference = after.minus(before)
        found[name] = Difference(before.value, after.value, difference.metric(), difference.p_value())
    return found
