"""From a sweep's keys to its trials: each is a complete, checked pretraining before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dermray import storage
from dermray.config import ConfigT, parse
from dermray.errors import ConfigError, PlanError
from dermray.ingest.corpora import Corpora
from dermray.train import epochs, toy
from dermray.train.settings import PretrainConfig
from dermray.tuning import basis
from dermray.tuning import space as spaces
from dermray.tuning.basis import Basis
from dermray.tuning.records import TrialRecord
from dermray.tuning.reports import validation_of
from dermray.tuning.settings import OWN_KEYS, SweepConfig
from dermray.tuning.space import Choice, Parameter

TRIALS = "trials"
# The trial's own process only waits for its workers.
TRIAL_CPUS = 0.01


@dataclass(frozen=True)
class Trial:
    """One point of the space.

    Attributes:
        name: `trial-000`, … in the order of the draw.
        params: config key → value drawn.
        recipe: the pretraining that it stands for, without what the sweep adds.
        config: the pretraining that runs.
        num_steps: optimiser steps of the whole training.
        basis: what its figures follow from.
        pause_at: the step at which its process shall pause; empty: it trains to its end.
    """

    name: str
    params: dict[str, Any]
    recipe: PretrainConfig
    config: PretrainConfig
    num_steps: int
    basis: Basis
    pause_at: int | None = None

    @property
    def uri(self) -> str:
        """The trial's own folder."""
        return self.config.output

    @property
    def validates_every(self) -> int:
        """Steps from one validation to the next."""
        every_steps = self.config.validation.every_steps
        assert every_steps is not None
        return every_steps

    def validation_of(self, step: int) -> int:
        """Number of the validation at `step`, from 1: what rungs are counted in."""
        return validation_of(step, self.validates_every)

    def samples_at(self, step: int) -> int:
        """Training samples seen after `step` steps."""
        return step * self.config.train.global_batch_size

    def label(self) -> str:
        """What was drawn, for humans."""
        return label(self.params)

    def recipe_yaml(self) -> str:
        """The trial as a recipe that `jobs/pretrain.py --config` accepts; corpus and output are left to the caller."""
        left_out = {key for key in OWN_KEYS if "." not in key}
        tree = self.recipe.recorded(exclude=left_out)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def plan_trials(config: SweepConfig, corpora: Corpora) -> list[Trial]:
    """Draw and check all trials: every point of a grid, or a random draw.

    With `search=tpe` the first of them are those it begins with; the others stand for points that are proposed later,
    and what an earlier process has begun is at its point.

    Raises:
        ConfigError: the recipe, an override or a drawn value is not what pretraining takes; names the key.
        SplitError: one of the corpora has no such split.
        PlanError: a batch size or number of workers does not fit the corpus; names the trial.
    """
    space, points = config.ordered_space, points_so_far(config)
    if config.scheduler.kind == "pbt":
        for params in _ends(space, points[0]):
            _recipe(config, params)
    return [_plan(config, trial_name(number), params, corpora) for number, params in enumerate(points)]


def trial_name(number: int) -> str:
    """`trial-000`, …"""
    return f"trial-{number:03d}"


def trial_uri(output: str, name: str) -> str:
    """The folder of a trial."""
    return storage.join(output, TRIALS, name)


def points_so_far(config: SweepConfig) -> list[dict[str, Any]]:
    """The planned points; with `search=tpe` those at which trials were begun in place of them.

    Raises:
        DermRayError: the record of a trial is damaged.
    """
    planned = planned_points(config)
    if config.search != "tpe":
        return planned
    begun = [TrialRecord.params_at(trial_uri(config.output, trial_name(number))) for number in range(len(planned))]
    return [params if known is None else known for params, known in zip(planned, begun, strict=True)]


def planned_points(config: SweepConfig) -> list[dict[str, Any]]:
    """Every point of a grid, or a random draw."""
    if config.search == "grid":
        return spaces.grid(config.ordered_space)
    return spaces.sample(config.ordered_space, num_trials=config.num_trials, seed=config.seed)


def _ends(space: Mapping[str, Parameter], point: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Points with one key at an end of its range or at one of its choices, where a perturbed trial may come to."""
    for key, parameter in space.items():
        for value in parameter.values if isinstance(parameter, Choice) else (parameter.low, parameter.high):
            yield {**point, key: value}


def with_params(config: SweepConfig, trial: Trial, params: dict[str, Any], corpora: Corpora) -> Trial:
    """The trial with another point of the space in place of its own; where and with what it runs stays.

    Raises:
        ConfigError, PlanError: as `plan_trials`.
    """
    other = _plan(config, trial.name, params, corpora)
    data = other.config.data.model_copy(update={"cpus_per_task": trial.config.data.cpus_per_task})
    kept = ("tracking", "cpus_per_worker", "threads_per_worker")
    stays = {"data": data, **{key: getattr(trial.config, key) for key in kept}}
    return replace(other, config=other.config.model_copy(update=stays))


def _plan(config: SweepConfig, name: str, params: dict[str, Any], corpora: Corpora) -> Trial:
    recipe = _recipe(config, params)
    try:
        num_steps = _num_steps(recipe, corpora)
    except PlanError as error:
        raise PlanError(f"{name} ({params}): {error}") from None
    runnable = _runnable(config, name, recipe, num_steps)
    return Trial(name, params, recipe, runnable, num_steps, basis.of_training(runnable, corpora, config.proposed_from))


def _recipe(config: SweepConfig, params: Mapping[str, Any]) -> PretrainConfig:
    """The recipe with overrides and drawn values, by the same road as the command line of `jobs/pretrain.py`."""
    keys = {**config.overrides, **params, "corpus": config.corpus, "output": config.output}
    return toy.shrunk(parsed(PretrainConfig, config.recipe, keys))


def parsed(config_class: type[ConfigT], recipe: str | None, keys: Mapping[str, Any]) -> ConfigT:
    """The sweep's recipe with other values for some keys.

    Raises:
        ConfigError: names recipe and key.
    """
    arguments = [] if recipe is None else ["--config", recipe]
    try:
        return parse(config_class, arguments, keys)
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe or ''} with overrides and space: {error}") from None


def _runnable(config: SweepConfig, name: str, recipe: PretrainConfig, num_steps: int) -> PretrainConfig:
    every_steps = math.ceil(num_steps / config.num_validations)
    return recipe.model_copy(
        update={
            "output": trial_uri(config.output, name),
            "run_name": name,
            "validation": recipe.validation.model_copy(update={"every_steps": every_steps}),
            "cluster": config.cluster,
            "tracking": config.tracking,
        }
    )


def _num_steps(recipe: PretrainConfig, corpora: Corpora) -> int:
    plan = epochs.first(recipe, corpora)
    plan.streams_of(0, recipe.most_workers)
    return recipe.num_steps(len(plan))


def share_cluster(
    config: SweepConfig, trials: list[Trial], *, num_cpus: float, num_gpus: float
) -> tuple[int, list[Trial]]:
    """How many trials run at once, and the trials with so many CPUs a worker that they do not wait for each other.

    A trial holds its place while it waits for its workers: two that fit only half each would wait for ever.

    Raises:
        ConfigError: the trials asked for at once do not fit the cluster.
    """
    most_workers = max(trial.config.most_workers for trial in trials)
    if num_gpus == 0 and any(trial.config.use_gpu for trial in trials):
        raise ConfigError("the trials ask for GPUs (use_gpu=true) and would wait for ever: the cluster has none")
    gpus = num_gpus > 0 and any(trial.config.use_gpu is not False for trial in trials)
    at_once = config.max_concurrent_trials or (max(1, int(num_gpus) // most_workers) if gpus else 1)
    if gpus and at_once * most_workers > num_gpus:
        raise ConfigError(
            f"{at_once} trials of {most_workers} workers need {at_once * most_workers} GPUs, the cluster has "
            f"{num_gpus:g}; lower max_concurrent_trials or overrides.num_workers"
        )
    shared = [_with_threads(_with_cpus(trial, at_once, num_cpus, gpus), at_once) for trial in trials]
    needed = at_once * max(_cpus_of(trial.config) for trial in shared)
    if needed > num_cpus:
        raise ConfigError(
            f"{at_once} trials at once need {needed:g} CPUs, the cluster has {num_cpus:g}; lower "
            "max_concurrent_trials, overrides.cpus_per_worker or overrides.num_workers"
        )
    return at_once, shared


def _with_cpus(trial: Trial, at_once: int, num_cpus: float, gpus: bool) -> Trial:
    if trial.config.cpus_per_worker is not None:
        return trial
    if gpus:
        return replace(trial, config=trial.config.model_copy(update={"cpus_per_worker": 1.0}))
    share = num_cpus / at_once / trial.config.most_workers
    cpus = round(share / 2, 3)
    left = math.floor((share - cpus - TRIAL_CPUS) * 1000) / 1000
    task = min(trial.config.data.cpus_per_task, max(left, 0.001))
    data = trial.config.data.model_copy(update={"cpus_per_task": task})
    return replace(trial, config=trial.config.model_copy(update={"cpus_per_worker": cpus, "data": data}))


def _with_threads(trial: Trial, at_once: int) -> Trial:
    """More threads than cores wait for each other: two trials side by side would be slower than one after the other."""
    if at_once == 1 or trial.config.threads_per_worker is not None:
        return trial
    threads = max(1, (os.cpu_count() or 1) // (at_once * trial.config.most_workers))
    return replace(trial, config=trial.config.model_copy(update={"threads_per_worker": threads}))


def _cpus_of(config: PretrainConfig) -> float:
    """CPUs without which a trial stands still: its own, its workers', and one decoding task for each of them."""
    assert config.cpus_per_worker is not None
    return TRIAL_CPUS + config.most_workers * (config.cpus_per_worker + config.data.cpus_per_task)


def label(params: Mapping[str, Any]) -> str:
    """What was drawn, for humans."""
    return " ".join(f"{key}={show(value)}" for key, value in params.items())


def show(value: Any) -> str:
    """A value as the command line takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip().removesuffix("...").strip()
