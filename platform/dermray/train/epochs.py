"""The epochs of a run, known to whoever counts steps: the driver, a sweep, and every worker."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dermray.corpus.accounts import require_balance, told_in_words
from dermray.corpus.manifest import Manifest
from dermray.errors import PlanError
from dermray.ingest import draws
from dermray.ingest.plan import Counts, EpochPlan, checked_counts
from dermray.train.objectives import kinds
from dermray.train.settings import PretrainConfig

# Why a sample is in no batch of an epoch.
LEFT_OVER = "less than a global batch, others each epoch"
NOT_DRAWN = "not used by the objective"
NOT_KEPT = "outside data.fraction"


def counts(config: PretrainConfig, manifest: Manifest) -> Counts | None:
    """How often the run draws each sample of the split `manifest`, by epoch; None: once each.

    Raises:
        PlanError: what the objective says of the first epoch says nothing.
    """
    of_objective = _of_objective(config, manifest)
    kept = _kept(config, manifest)
    if kept is None:
        return of_objective
    if of_objective is None:
        return lambda _: kept
    weights = functools.partial(_of_kept, of_objective, kept)
    sizes, length = manifest.row_group_sizes(), int(weights(0).sum())

    def drawn(epoch: int) -> np.ndarray:
        # What the objective draws of the kept samples may be another number each epoch; a run needs the same.
        return draws.stretch(weights(epoch), sizes, seed=config.seed, begin=epoch * length, length=length)

    return drawn if length else weights


def _of_objective(config: PretrainConfig, manifest: Manifest) -> Counts | None:
    of_kind = kinds.find(config.objective.kind).counts
    return None if of_kind is None else of_kind(config, manifest)


def _kept(config: PretrainConfig, manifest: Manifest) -> np.ndarray | None:
    """1 for samples that are trained on, 0 for those outside `data.fraction`; None: all are."""
    if config.data.fraction == 1:
        return None
    return draws.share(manifest.row_group_sizes(), seed=config.seed, fraction=config.data.fraction)


def _of_kept(of_objective: Counts, kept: np.ndarray, epoch: int) -> np.ndarray:
    weights = checked_counts(of_objective(epoch), len(kept)) * kept
    if epoch and not weights.any():
        raise PlanError(f"the objective uses none of the samples that data.fraction keeps in epoch {epoch}")
    return weights


def first(config: PretrainConfig, manifest: Manifest) -> EpochPlan:
    """The plan of the first epoch over a whole corpus's `manifest`.

    Raises:
        CorpusError: the corpus has no such split.
        PlanError: it does not fill a global batch, or the next epoch has another number of draws.
    """
    split = manifest.select(config.data.split)
    drawn = counts(config, split)

    def plan(epoch: int) -> EpochPlan:
        return EpochPlan(
            split,
            seed=config.seed,
            epoch=epoch,
            global_batch_size=config.train.global_batch_size,
            counts=None if drawn is None else drawn(epoch),
        )

    made = plan(0)
    # The loader meets other epochs when they come, which may be hours later.
    if drawn is not None and (other := plan(1).num_draws) != made.num_draws:
        raise PlanError(
            f"the objective draws {made.num_draws} samples in epoch 0 and {other} in epoch 1; all epochs must have the "
            "same number, or a step no longer says where a run is"
        )
    return made


def account(config: PretrainConfig, manifest: Manifest) -> str:
    """A line about what an epoch takes of the split's samples, for whoever starts the run.

    Raises:
        AssertionError: the plan has lost samples.
        CorpusError, PlanError: as `first`.
    """
    plan = first(config, manifest)
    told: dict[str, Any] = {LEFT_OVER: plan.num_draws % config.train.global_batch_size}
    if plan.num_draws == plan.num_samples and not plan.num_not_drawn:
        figures = require_balance("epoch", plan.num_samples, plan.num_samples_used, told)
        return f"an epoch of the split {config.data.split}: {told_in_words(figures)}"
    figures = require_balance("epoch", plan.num_draws, plan.num_samples_used, told)
    kept = _kept(config, manifest.select(config.data.split))
    num_not_kept = 0 if kept is None else int((kept == 0).sum())
    not_drawn = {NOT_KEPT: num_not_kept, NOT_DRAWN: plan.num_not_drawn - num_not_kept}
    samples = require_balance("split", plan.num_samples, plan.num_samples - plan.num_not_drawn, not_drawn)
    return (
        f"an epoch of the split {config.data.split} draws {told_in_words(samples)}; "
        f"of its draws: {told_in_words(figures, unit='draws')}"
    )
