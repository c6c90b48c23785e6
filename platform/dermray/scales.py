"""How a score is read: whether less of it is better, and whether it is a share of 1 or has a unit.

Reports, comparisons, the gate and the validation of a training all read it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Best = Literal["max", "min"]
# What stands for a score that is not defined, on pages and terminals.
NO_VALUE = "\u2013"
# What the scores of retrieval begin with: an image's caption is looked for, and a caption's image.
RETRIEVAL_WAYS = ("image_to_text", "text_to_image")
# By the end of their names, scores of which less is better where the report does not say it of each.
LOWER_IS_BETTER = ("_rank", "ece", "brier", "brier_score", "calibration_error", "nll", "gap")
# And those of them that are no share of 1.
_BARE = ("_rank",)


@dataclass(frozen=True)
class Scale:
    """Of one score.

    Attributes:
        lower_is_better: else more is.
        unit: printed behind the number, "mm"; empty for a bare number, such as a rank. None: a share of 1, such as an
            accuracy or an area under a curve, which is printed as a percentage.
    """

    lower_is_better: bool = False
    unit: str | None = None

    @property
    def is_share(self) -> bool:
        """Whether it is a share of 1, which differences of other scores cannot be set beside."""
        return self.unit is None

    def said(self, value: float | None, low: float | None = None, high: float | None = None) -> str:
        """A score and its interval for a terminal: "87.1 % [84.2, 90.0]", "3.25 mm [3.1, 3.4]"; a dash for no value."""
        if value is None:
            return NO_VALUE
        shown = [None if one is None else f"{100 * one:.1f}" if self.is_share else f"{one:.4g}" for one in (low, high)]
        interval = "" if None in shown else f" [{shown[0]}, {shown[1]}]"
        return (f"{100 * value:.1f} %" if self.is_share else f"{value:.4g} {self.unit}".rstrip()) + interval

    def to_json(self) -> dict[str, Any]:
        """What a report keeps of it beside the score."""
        return asdict(self)


def of(name: str, score: Mapping[str, Any]) -> Scale:
    """Of a score in a report; where that does not say it, as in older ones, by the end of the score's name.

    Args:
        name: of the score.
        score: `value`, `low`, `high`, and what `Scale.to_json` gave.
    """
    if "lower_is_better" in score:
        return Scale(bool(score["lower_is_better"]), score.get("unit"))
    return Scale(name.endswith(LOWER_IS_BETTER), "" if name.endswith(_BARE) else None)


def best(names: Iterable[str]) -> dict[str, Best]:
    """Whether the highest or the lowest of each score is best, by the ends of their names as in `of`."""
    return {name: "min" if of(name, {}).lower_is_better else "max" for name in names}
