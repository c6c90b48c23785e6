"""Scores of times to an event, public names; they are computed in `dermray.evaluate.statistics`."""

from dermray.evaluate.statistics.concordance import dynamic_auc, harrell_c, mean_dynamic_auc, uno_c
from dermray.evaluate.statistics.survival import SurvivalCurve, kaplan_meier, log_rank

__all__ = [
    "SurvivalCurve",
    "dynamic_auc",
    "harrell_c",
    "kaplan_meier",
    "log_rank",
    "mean_dynamic_auc",
    "uno_c",
]
