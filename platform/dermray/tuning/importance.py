"""How much of the differences between trials each parameter explains: functional ANOVA (Hutter et al., ICML 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from dermray.tuning.proposals import distribution, to_optuna
from dermray.tuning.records import TrialRecord
from dermray.tuning.settings import SweepConfig

# A forest over fewer points would explain noise.
MIN_TRIALS = 6


def of_parameters(config: SweepConfig, found: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Shares of the variance of the objective, which sum to 1; None where too few trials can be compared.

    All trials are compared at the last validation that each of them has reached, those that were stopped included.
    Parameters that not every trial has (conditions) are left out. Trials of a population change theirs under way, and
    say nothing.

    Returns:
        `validation` (its number), `num_trials`, `shares` (parameter → share, the largest first).
    """
    comparable = [record for record in found if record.curve]
    if len(comparable) < MIN_TRIALS or config.scheduler.kind == "pbt":
        return None
    validation = min(record.curve[-1].validation for record in comparable)
    values = [next(p.metrics[config.objective] for p in r.curve if p.validation >= validation) for r in comparable]
    common = [key for key in config.space if all(key in record.params for record in comparable)]
    varied = [key for key in common if len({str(record.params[key]) for record in comparable}) > 1]
    if not varied or len(set(values)) == 1:
        return None
    # It loads scikit-learn, which takes seconds; a sweep of few trials does without.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    study = optuna.create_study(direction="maximize" if config.mode == "max" else "minimize")
    study.add_trials(
        create_trial(
            state=TrialState.COMPLETE,
            value=value,
            params={key: to_optuna(config.space[key], record.params[key]) for key in varied},
            distributions={key: distribution(config.space[key]) for key in varied},
        )
        for record, value in zip(comparable, values, strict=True)
    )
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=config.seed), params=varied)
    return {"validation": validation, "num_trials": len(comparable), "shares": dict(shares)}
