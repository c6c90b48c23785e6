"""The epochs of a run, known to whoever counts steps: the driver, a sweep, and every worker."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dermray.corpus.accounts import require_balance, told_in_words
from dermray.corpus.manifest import Manifest
from dermray.errors import PlanError
from dermray.ingest import draws
from dermray.ingest import items as several
from dermray.ingest.corpora import Corpora
from dermray.ingest.plan import Counts, EpochPlan, checked_counts
from dermray.models import layout
from dermray.train.checkpoint import DRAWS, FROZEN
from dermray.train.objectives import kinds
from dermray.train.settings import PretrainConfig

# Why a sample is in no batch of an epoch.
LEFT_OVER = "less than a global batch, others each epoch"
NOT_DRAWN = "not used by the objective"
NOT_KEPT = "outside data.fraction"
NOT_YET = "beyond the corpus's weight, others each epoch"
# What objectives have said, by all that decides it: a driver and its workers ask several times.
MAX_ASKED = 4
_asked: dict[tuple[str, tuple[str, ...], str], list[CorpusDraws]] = {}


@dataclass(frozen=True)
class CorpusDraws:
    """How often an epoch draws each sample of one corpus.

    Attributes:
        uri: of the corpus.
        sizes: samples of each row group of its split, int64 `[num_row_groups]`.
        of_objective: how often the objective draws each sample, by epoch; None: once each.
        kept: 1 for samples that are trained on, 0 for those outside `data.fraction`; None: all are.
        length: draws of every epoch; None: as many as the other attributes say.
        items: samples of the item that begins with each, int64 `[num_samples]`; None: each is one.
    """

    uri: str
    sizes: np.ndarray
    of_objective: Counts | None
    kept: np.ndarray | None
    length: int | None = None
    items: np.ndarray | None = None

    def weights(self, epoch: int) -> np.ndarray:
        """What the objective draws of the kept samples, int64 `[num_samples]`."""
        num_samples = int(self.sizes.sum())
        drawn = np.ones(num_samples, dtype=np.int64)
        if self.of_objective is not None:
            drawn = checked_counts(self.of_objective(epoch), num_samples)
        if self.items is not None:
            drawn = drawn * (self.items > 0)
        return drawn if self.kept is None else drawn * self.kept

    def counts(self, epoch: int, seed: int) -> np.ndarray:
        """Draws of each sample, int64 `[num_samples]`.

        Raises:
            PlanError: there are to be some, and the objective uses no sample.
        """
        weights = self.weights(epoch)
        if self.length is None:
            return weights
        if self.length == 0:
            return np.zeros_like(weights)
        if not weights.any():
            kept = "" if self.kept is None else " that data.fraction keeps"
            raise PlanError(f"the objective uses none of the samples{kept} of {self.uri} in epoch {epoch}")
        # What the objective draws may be another number each epoch; a run needs the same.
        return draws.stretch(weights, self.sizes, seed=seed, begin=epoch * self.length, length=self.length)

    def left_out(self, counts: np.ndarray) -> dict[str, int]:
        """How many samples the first epoch leaves out, by reason, given its counts."""
        used = several.covered(self.weights(0) > 0, self.items)
        num_not_kept = 0 if self.kept is None else int(((self.kept == 0) & ~used).sum())
        num_unused = int((~used).sum())
        num_left_out = len(counts) - self.num_drawn(counts)
        return {NOT_KEPT: num_not_kept, NOT_DRAWN: num_unused - num_not_kept, NOT_YET: num_left_out - num_unused}

    def num_drawn(self, counts: np.ndarray) -> int:
        """How many different samples are in an item that is drawn, given counts of an epoch."""
        return int(several.covered(counts > 0, self.items).sum())


def trajectory(config: PretrainConfig, corpora: Corpora) -> dict[str, Any]:
    """All that decides the weights over whole corpora: the keys, and what the run draws by counts.

    Of the draws it is the SHA-256 of the first two epochs' counts, and of the items: an objective whose code draws
    others now than when a run began must not go on with that run. None: each sample is drawn once. Of models that the
    run only reads it is the digest of their weights; one that is gone says nothing.

    Raises:
        CorpusError: a corpus has no such split.
        ModelError: a model's weights are not those that its folder names.
    """
    split, digest = corpora.select(config.data.split), None
    drawn, of_several = counts(config, split), items(config, split)
    if drawn is not None:
        parts = [np.asarray(drawn(epoch), np.int64) for epoch in (0, 1)]
        parts += [] if of_several is None else [of_several]
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    weights = [layout.weights_digest(folder) for folder in kinds.frozen_of(config)]
    frozen = {FROZEN: weights} if weights and None not in weights else {}
    return {**config.trajectory(), DRAWS: digest, **frozen}


def counts(config: PretrainConfig, split: Corpora) -> Counts | None:
    """How often the run draws each sample of the split, by epoch; None: once each.

    Raises:
        PlanError: a corpus has too small a weight, or what the objective says of the first epoch says nothing.
    """
    parts = _of_corpora(config, split)
    if all(value is None for part in parts for value in (part.of_objective, part.kept, part.length, part.items)):
        return None
    return lambda epoch: np.concatenate([part.counts(epoch, config.seed) for part in parts])


def items(config: PretrainConfig, split: Corpora) -> np.ndarray | None:
    """Samples of the item that begins with each of the split, int64 `[num_samples]`; None: each is an item.

    Raises:
        PlanError: what the objective says are no items.
    """
    found = [part.items for part in _of_corpora(config, split) if part.items is not None]
    return np.concatenate(found) if found else None


def _items_of(config: PretrainConfig, uri: str, manifest: Manifest) -> np.ndarray | None:
    """Items of one corpus, whose objective is asked as by a run over it alone."""
    of_kind = kinds.find(config.objective.kind).items
    if of_kind is None:
        return None
    return several.checked(of_kind(config.model_copy(update={"corpus": uri}), manifest), manifest.row_group_sizes())


def _of_corpora(config: PretrainConfig, split: Corpora) -> list[CorpusDraws]:
    """What is drawn of each corpus; remembered, since the objective may read columns of all samples to say it."""
    key = (json.dumps(config.trajectory(), sort_keys=True, default=str), split.uris, split.digest)
    if key not in _asked:
        while len(_asked) >= MAX_ASKED:
            _asked.pop(next(iter(_asked)))
        _asked[key] = _ask(config, split)
    return _asked[key]


def _ask(config: PretrainConfig, split: Corpora) -> list[CorpusDraws]:
    fraction, of_kind = config.data.fraction, kinds.find(config.objective.kind).counts
    parts = []
    for uri, manifest in zip(split.uris, split.manifests, strict=True):
        sizes = manifest.row_group_sizes()
        # An objective is asked as by a run over this corpus alone.
        alone = config.model_copy(update={"corpus": uri})
        of_objective = None if of_kind is None else of_kind(alone, manifest)
        kept = None if fraction == 1 else draws.share(sizes, seed=config.seed, fraction=fraction)
        parts.append(CorpusDraws(uri, sizes, of_objective, kept, items=_items_of(config, uri, manifest)))
    weights = [share.weight for share in config.corpora if share.weight is not None]
    if not weights and fraction == 1:
        return parts
    lengths = [int(part.weights(0).sum()) for part in parts]
    if weights:
        lengths = _weighted(sum(lengths), weights, split.uris)
    return [replace(part, length=length) for part, length in zip(parts, lengths, strict=True)]


def _weighted(total: int, weights: Sequence[float], uris: Sequence[str]) -> list[int]:
    """Draws of each corpus, so that all together are as many as without weights."""
    if not total:
        raise PlanError(f"the objective uses none of the samples of {', '.join(uris)}")
    lengths = draws.apportioned(total, weights)
    for uri, weight, length in zip(uris, weights, lengths, strict=True):
        if not length:
            raise PlanError(
                f"the weight {weight:g} of {uri} is less than one of an epoch's {total:,} draws; give it a greater "
                "one, or leave the corpus out"
            )
    return lengths


def first(config: PretrainConfig, corpora: Corpora) -> EpochPlan:
    """The plan of the first epoch over whole corpora.

    Raises:
        CorpusError: a corpus has no such split.
        PlanError: they do not fill a global batch, or the next epoch has another number of draws.
    """
    split = corpora.select(config.data.split)
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


def account(config: PretrainConfig, corpora: Corpora) -> str:
    """A line about what an epoch takes of the split's samples, for whoever starts the run.

    Raises:
        AssertionError: the plan has lost samples.
        CorpusError, PlanError: as `first`.
    """
    plan = first(config, corpora)
    told: dict[str, Any] = {LEFT_OVER: plan.num_draws % config.train.global_batch_size}
    parts = _of_corpora(config, corpora.select(config.data.split))
    of_parts = [part.counts(0, config.seed) for part in parts]
    shares = [
        f"{int(of_part.sum()):,} of {part.uri} ({len(of_part):,} samples)"
        for part, of_part in zip(parts, of_parts, strict=True)
    ]
    by_corpus = f"; draws by corpus: {', '.join(shares)}" if len(parts) > 1 else ""
    num_drawn = sum(part.num_drawn(of_part) for part, of_part in zip(parts, of_parts, strict=True))
    if plan.num_draws == plan.num_samples == num_drawn:
        figures = require_balance("epoch", plan.num_samples, plan.num_samples_used, told)
        return f"an epoch of the split {config.data.split}: {told_in_words(figures)}{by_corpus}"
    figures = require_balance("epoch", plan.num_draws, plan.num_samples_used, told)
    not_drawn = Counter[str]()
    for part, of_part in zip(parts, of_parts, strict=True):
        not_drawn.update(part.left_out(of_part))
    samples = require_balance("split", plan.num_samples, num_drawn, not_drawn)
    return (
        f"an epoch of the split {config.data.split} draws {told_in_words(samples)}; "
        f"of its draws: {told_in_words(figures, unit='draws')}{by_corpus}"
    )
