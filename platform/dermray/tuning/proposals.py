"""What the next trial shall try: drawn at random, next on a grid, or proposed by Optuna from the trials so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from dermray.tuning import space as spaces
from dermray.tuning.records import Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from dermray.tuning.space import Choice, Integer, LogUniform, Parameter

# It announces every study.
optuna.logging.set_verbosity(optuna.logging.WARNING)
# Before so many trials have figures, TPE draws at random (Bergstra et al., 2011).
TPE_STARTUP_TRIALS = 5
MAX_ATTEMPTS = 20
STATES = {Status.FINISHED: TrialState.COMPLETE, Status.STOPPED: TrialState.PRUNED, Status.FAILED: TrialState.FAIL}


def proposal(config: SweepConfig, number: int, records: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """What Optuna proposes as trial `number`; None while the planned point shall be taken.

    The proposal depends on `config.seed`, `number` and what the records say, on nothing else.

    Args:
        number: from 0.
        records: of the trials so far, also of those under way.
    """
    known = [record for record in records if record.curve]
    if config.search != "tpe" or len(known) < TPE_STARTUP_TRIALS:
        return None
    space = config.ordered_space
    taken = [record.params for record in records]
    for attempt in range(MAX_ATTEMPTS):
        (seed,) = np.random.SeedSequence([config.seed, number, attempt]).generate_state(1)
        values = _ask(config, space, known, seed=int(seed))
        if values not in taken:
            return values
    return None


def _ask(
    config: SweepConfig, space: Mapping[str, Parameter], records: Sequence[TrialRecord], seed: int
) -> dict[str, Any]:
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
    direction: Literal["maximize", "minimize"] = "maximize" if config.mode == "max" else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials([frozen(record, space, config.objective) for record in records])
    trial = study.ask()
    values: dict[str, Any] = {}
    for key, parameter in space.items():
        if parameter.varies(values):
            values[key] = from_optuna(parameter, _suggest(trial, key, parameter))
    return values


def _suggest(trial: optuna.Trial, key: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(key, list(range(len(parameter.values))))
    if isinstance(parameter, Integer):
        return trial.suggest_int(key, parameter.low, parameter.high)
    return trial.suggest_float(key, parameter.low, parameter.high, log=isinstance(parameter, LogUniform))


def frozen(record: TrialRecord, space: Mapping[str, Parameter], objective: str) -> FrozenTrial:
    """A trial as Optuna keeps it: its last figure as value, its curve by validation."""
    state = STATES.get(record.status, TrialState.RUNNING)
    curve = {point.validation: point.metrics[objective] for point in record.curve}
    finished = state is TrialState.COMPLETE
    return create_trial(
        state=state,
        value=record.value(objective) if finished else None,
        params={key: to_optuna(space[key], value) for key, value in record.params.items()},
        distributions={key: distribution(space[key]) for key in record.params},
        intermediate_values=curve,
    )


def distribution(parameter: Parameter) -> BaseDistribution:
    """A parameter as Optuna's; a choice by the positions of its values, which may be of any type."""
    if isinstance(parameter, Choice):
        return CategoricalDistribution(list(range(len(parameter.values))))
    if isinstance(parameter, Integer):
        return IntDistribution(parameter.low, parameter.high)
    return FloatDistribution(parameter.low, parameter.high, log=isinstance(parameter, LogUniform))


def to_optuna(parameter: Parameter, value: Any) -> Any:
    """A value of a trial as `distribution` counts it."""
    return parameter.values.index(value) if isinstance(parameter, Choice) else value


def from_optuna(parameter: Parameter, value: Any) -> Any:
    """A value of `distribution` as a recipe takes it, of few enough digits to be read."""
    if isinstance(parameter, Choice):
        return parameter.values[value]
    if isinstance(parameter, Integer):
        return int(value)
    digits = spaces.SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(abs(value))) if value else 0
    return min(max(round(value, digits), parameter.low), parameter.high)
