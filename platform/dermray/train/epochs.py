"""The epochs of a run, known to whoever counts steps: the driver, a sweep, and every worker."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from dermray.corpus.accounts import require_balance, told_in_words
from dermray.corpus.manifest import Manifest
from dermray.errors import PlanError
from dermray.ingest.plan import Counts, EpochPlan
from dermray.train.checkpoint import DRAWS
from dermray.train.objectives import kinds
from dermray.train.settings import PretrainConfig

# Why a sample is in no batch of an epoch.
LEFT_OVER = "less than a global batch, others each epoch"
NOT_DRAWN = "not used by the objective"


def counts(config: PretrainConfig, manifest: Manifest) -> Counts | None:
    """How often the run's objective draws each sample of the split `manifest`; None: once each."""
    of_kind = kinds.find(config.objective.kind).counts
    return None if of_kind is None else of_kind(config, manifest)


def trajectory(config: PretrainConfig, manifest: Manifest) -> dict[str, Any]:
    """All that decides the weights over a whole corpus's `manifest`: the keys, and what the objective draws by counts.

    Of the draws it is the SHA-256 of the first two epochs' counts: an objective whose code draws others now than when
    a run began must not go on with that run. None: each sample is drawn once.

    Raises:
        CorpusError: the corpus has no such split.
    """
    digest = None
    if kinds.find(config.objective.kind).counts is not None:
        drawn = counts(config, manifest.select(config.data.split))
        assert drawn is not None
        digest = hashlib.sha256(b"".join(np.asarray(drawn(epoch), np.int64).tobytes() for epoch in (0, 1))).hexdigest()
    return {**config.trajectory(), DRAWS: digest}


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
    samples = require_balance(
        "split", plan.num_samples, plan.num_samples - plan.num_not_drawn, {NOT_DRAWN: plan.num_not_drawn}
    )
    return (
        f"an epoch of the split {config.data.split} draws {told_in_words(samples)}; "
        f"of its draws: {told_in_words(figures, unit='draws')}"
    )
