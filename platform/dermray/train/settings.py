"""Keys of a pretraining run: one typed tree, of which every recipe in `jobs/configs/` is an instance."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from dermray.config import ClusterConfig, Config, DecidesWeights, LeavesWeights, TrackingConfig
from dermray.corpus.shares import CorpusShare, CorpusShares, shares_of, uris_of
from dermray.ingest.settings import DataConfig
from dermray.ledger import WaitForOutput
from dermray.models.architectures import Tower
from dermray.train.objectives import kinds
from dermray.train.objectives.contrastive.settings import LossConfig
from dermray.train.objectives.kinds import ObjectiveConfig
from dermray.train.trajectory import decisive

# Where the cadence of checkpoints is left open.
CHECKPOINT_EVERY_STEPS = 200
CHECKPOINTS_A_RUN = 4

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["cosine", "constant", "cosine_cooldown", "constant_cooldown"]
COOLDOWN = "_cooldown"


class TrainConfig(Config):
    """The loop."""

    epochs: DecidesWeights[float] = Field(30, gt=0, description="passes over the split; a fraction cuts the last one")
    max_steps: DecidesWeights[int | None] = Field(
        None, ge=1, description="end after so many optimiser steps; empty: train.epochs decides"
    )
    global_batch_size: DecidesWeights[int] = Field(
        4096, ge=1, description="samples of one optimiser step over all workers"
    )
    micro_batch_size: LeavesWeights[int | None] = Field(
        None, ge=1, description="samples of a worker that go through the towers at once; empty: all"
    )
    precision: DecidesWeights[Precision] = Field("auto", description="auto: bf16 autocast on GPU, fp32 on CPU")
    grad_clip_norm: DecidesWeights[float | None] = Field(
        None, gt=0, description="clip the global gradient norm; empty: no clipping"
    )
    tf32: LeavesWeights[bool] = Field(True, description="float32 products on a GPU run in TF32")
    channels_last: LeavesWeights[bool] = Field(False, description="images and vision tower in channels-last layout")
    compile: LeavesWeights[bool] = Field(
        False, description="torch.compile the towers, block by block; the first steps are slow"
    )
    grad_checkpointing: LeavesWeights[float] = Field(
        0.0, ge=0, le=1, description="share of each tower's blocks that are recomputed in the backward pass"
    )
    grad_checkpointing_keeps: LeavesWeights[Literal["nothing", "products"]] = Field(
        "nothing",
        description="of recomputed blocks; products: results of matrix products and attention, so little runs again",
    )
    ema_decay: DecidesWeights[float | None] = Field(
        None, gt=0, lt=1, description="average the weights with this decay a step, validate and export the average"
    )
    lock: DecidesWeights[tuple[Tower, ...]] = Field(
        (), description="towers that keep their weights: image, text, or [image, text]"
    )
    lock_image_unlocked_groups: DecidesWeights[int] = Field(
        0, ge=0, description="of a locked image tower so many last groups are trained, counted as open_clip does"
    )
    lock_text_unlocked_layers: DecidesWeights[int] = Field(
        0, ge=0, description="of a locked text tower so many last layers are trained, counted as open_clip does"
    )
    max_skipped_steps: LeavesWeights[int] = Field(
        3, ge=0, description="so many steps in a row may be left out for gradients that are not finite"
    )
    log_every_steps: LeavesWeights[int] = Field(
        10, ge=1, description="cadence of the progress line and of MLflow metrics"
    )
    checkpoint_every_steps: LeavesWeights[int | None] = Field(
        None, ge=1, description="cadence of checkpoints; empty: 200, or a quarter of the run if that is less"
    )
    checkpoint_every_minutes: LeavesWeights[float | None] = Field(
        5.0, gt=0, description="also a checkpoint when the last one is so old; null: by steps only"
    )
    keep_checkpoints: LeavesWeights[int] = Field(2, ge=1, description="how many of the last checkpoints stay")
    keep_best: LeavesWeights[str | None] = Field(
        None, description="validation score (validation_zero_shot_accuracy, …) whose best checkpoint stays too"
    )
    keep_best_mode: LeavesWeights[Literal["max", "min"] | None] = Field(
        None, description="whether the highest or the lowest is best; empty: as the objective says of the score"
    )
    grace_s: LeavesWeights[float] = Field(
        60, gt=0, description="seconds for the last checkpoint after SIGTERM; then the run is aborted"
    )
    resize_every_s: LeavesWeights[float] = Field(
        60, gt=0, description="with num_workers=[least, most]: how often to look whether another number fits"
    )
    max_failures: LeavesWeights[int] = Field(
        3, ge=-1, description="restarts after a lost worker or node; -1: without limit"
    )
    collective_timeout_s: LeavesWeights[int] = Field(
        600, ge=10, description="a collective that takes longer fails the attempt"
    )

    @field_validator("lock", mode="before")
    @classmethod
    def _one_or_both(cls, value: Any) -> Any:
        named = [value] if isinstance(value, str) else value
        if not isinstance(named, list | tuple) or not all(isinstance(tower, str) for tower in named):
            return named
        # Their order says nothing, and a resumed run compares.
        return tuple(sorted(set(named)))

    @model_validator(mode="after")
    def _unlocks_what_is_locked(self) -> TrainConfig:
        for tower, key in (("image", "lock_image_unlocked_groups"), ("text", "lock_text_unlocked_layers")):
            if getattr(self, key) and tower not in self.lock:
                raise ValueError(f"{key} means something with lock={tower} alone")
        return self

    @property
    def unlocked(self) -> dict[Tower, int]:
        """How many last groups of each tower stay trained if it is locked."""
        return {"image": self.lock_image_unlocked_groups, "text": self.lock_text_unlocked_layers}

    def checkpoint_cadence(self, num_steps: int) -> int:
        """Steps from one checkpoint to the next in a run of so many."""
        return self.checkpoint_every_steps or min(CHECKPOINT_EVERY_STEPS, max(1, num_steps // CHECKPOINTS_A_RUN))


class OptimConfig(Config):
    """AdamW with open_clip's parameter groups; linear warm-up, then a schedule."""

    lr: DecidesWeights[float] = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: DecidesWeights[float] = Field(
        0.1, ge=0, description="of matrices; biases, norms and logit_scale are exempt"
    )
    beta1: DecidesWeights[float] = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: DecidesWeights[float] = Field(0.98, ge=0, lt=1, description="AdamW beta2")
    eps: DecidesWeights[float] = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup_steps: DecidesWeights[int] = Field(1000, ge=0, description="steps of linear warm-up")
    schedule: DecidesWeights[Schedule] = Field(
        "cosine", description="of the rate after the warm-up; with _cooldown it falls at the end of the run"
    )
    cooldown_epochs: DecidesWeights[float | None] = Field(
        None, gt=0, allow_inf_nan=False, description="of a schedule with a cooldown: how long before the end it begins"
    )
    cooldown_power: DecidesWeights[float] = Field(
        1.0, gt=0, allow_inf_nan=False, description="of the polynomial by which the rate falls; 1: a line"
    )
    cooldown_lr: DecidesWeights[float] = Field(0.0, ge=0, description="rate that the cooldown ends at")
    factors: DecidesWeights[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = Field(
        {}, description="by part of the model what the rate is multiplied with: {image: 0.1, text: 1.0, scale: 1.0}"
    )

    @model_validator(mode="after")
    def _cooldown_fits(self) -> OptimConfig:
        fields = type(self).model_fields
        keys = ("cooldown_epochs", "cooldown_power", "cooldown_lr")
        given = [key for key in keys if getattr(self, key) != fields[key].default]
        if not self.cools_down and given:
            raise ValueError(
                f"{', '.join(given)}: no effect with schedule={self.schedule}; there are "
                "cosine_cooldown and constant_cooldown"
            )
        if self.cools_down and self.cooldown_epochs is None:
            raise ValueError(f"schedule={self.schedule} needs cooldown_epochs")
        if self.cooldown_lr >= self.lr:
            raise ValueError(f"cooldown_lr={self.cooldown_lr:g} must be below lr={self.lr:g}")
        return self

    @property
    def cools_down(self) -> bool:
        """Whether the rate falls at the end of the run."""
        return self.schedule.endswith(COOLDOWN)

    def cooldown_steps(self, steps_per_epoch: int) -> int:
        """Steps of the cooldown, 0 without one."""
        return max(1, math.floor((self.cooldown_epochs or 0) * steps_per_epoch)) if self.cools_down else 0


class ValidationConfig(Config):
    """Scores on held-out samples during training."""

    every_steps: int | None = Field(None, ge=1, description="cadence; empty: no validation while training")
    split: str = Field("val", description="split of the corpus to score on")
    max_samples: int = Field(512, ge=1, description="score the first so many samples of the split")


class PretrainConfig(Config):
    """Everything `jobs/pretrain.py` can be told."""

    corpus: CorpusShares = Field(
        description="URI of a prepared corpus, or several with their shares of an epoch: [{uri: URI, weight: 2}, …]"
    )
    output: LeavesWeights[str] = Field(
        description="URI for checkpoints and the model folder; the same URI again resumes"
    )
    model: DecidesWeights[str] = Field(
        "ViT-B-16", description="open_clip architecture, one of ours, or a model folder to start from"
    )
    pretrained: DecidesWeights[str | None] = Field(
        None, description="weights to start from: open_clip tag, checkpoint path or URI, or hf-hub:ORG/NAME"
    )
    pretrained_image: DecidesWeights[str | None] = Field(
        None, description="checkpoint of the vision tower alone: path, URI or hf-hub:ORG/NAME"
    )
    pretrained_text: DecidesWeights[str | None] = Field(
        None, description="checkpoint of the language model in a Hugging Face text tower: path, URI or hf-hub:ORG/NAME"
    )
    toy: LeavesWeights[bool] = Field(
        False, description="true: shrink the recipe to a minute on a CPU (docs/training.md says how)"
    )
    run_name: LeavesWeights[str | None] = Field(
        None, description="name of the run in MLflow; empty: from model and output"
    )
    wait_for_output_s: LeavesWeights[WaitForOutput] = 0.0
    resume: LeavesWeights[Literal["same", "force"]] = Field(
        "same", description="force: go on from output's checkpoint although corpus or settings differ"
    )
    seed: DecidesWeights[int] = Field(0, ge=0, description="of initial weights, order and augmentation")
    num_workers: LeavesWeights[int | tuple[int, int]] = Field(
        1, description="training workers (data-parallel ranks); [least, most]: as many as there is room for"
    )
    use_gpu: LeavesWeights[bool | None] = Field(None, description="empty: if the cluster has GPUs")
    cpus_per_worker: LeavesWeights[float | None] = Field(
        None, gt=0, description="logical CPUs a worker reserves; empty: 1 with a GPU, else half of the cluster shared"
    )
    threads_per_worker: LeavesWeights[int | None] = Field(
        None, ge=1, description="threads that a worker computes with on a CPU; empty: cores over num_workers"
    )
    train: TrainConfig = TrainConfig()
    objective: SerializeAsAny[ObjectiveConfig] = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    validation: LeavesWeights[ValidationConfig] = ValidationConfig()
    cluster: LeavesWeights[ClusterConfig] = ClusterConfig()
    tracking: LeavesWeights[TrackingConfig] = TrackingConfig()

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_or_two_counts(cls, value: Any) -> Any:
        counts = list(value) if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts)
        if not numbers or len(counts) not in (1, 2) or counts != sorted(counts):
            raise ValueError(f"needs a number from 1 on, or [least, most], got {value!r}")
        return counts[0] if len(counts) == 1 else tuple(counts)

    @field_validator("objective", mode="before")
    @classmethod
    def _by_its_kind(cls, value: Any) -> ObjectiveConfig:
        return kinds.settings_of(value)

    @model_validator(mode="after")
    def _best_needs_scores(self) -> PretrainConfig:
        if self.train.keep_best is not None and self.validation.every_steps is None:
            raise ValueError("train.keep_best needs validation.every_steps")
        return self

    @property
    def corpora(self) -> tuple[CorpusShare, ...]:
        """Of the run, a single one too."""
        return shares_of(self.corpus)

    @property
    def corpus_uris(self) -> tuple[str, ...]:
        """Where they are."""
        return uris_of(self.corpus)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return isinstance(self.num_workers, tuple)

    @property
    def least_workers(self) -> int:
        """The fewest workers with which the run goes on."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The most workers that the run will have."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def best_mode(self) -> Literal["max", "min"]:
        """Whether the highest or the lowest `train.keep_best` is best."""
        of_objective = kinds.find(self.objective.kind).scores.get(self.train.keep_best or "", "max")
        return self.train.keep_best_mode or of_objective

    def samples_at_once(self, world_size: int) -> int:
        """How many samples of a worker go through the towers together."""
        of_worker = self.train.global_batch_size // world_size
        return min(of_worker, self.train.micro_batch_size or of_worker)

    def trajectory(self) -> dict[str, Any]:
        """The keys that decide which weights come out; a resumed run must agree on all of them."""
        return decisive(self)

    def initial_weights(self) -> dict[str, str | None]:
        """Where weights come from, by the parameters of `models.create`."""
        return {
            "pretrained": self.pretrained,
            "pretrained_image": self.pretrained_image,
            "pretrained_text": self.pretrained_text,
        }

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run, at least one."""
        steps = max(1, math.floor(self.train.epochs * steps_per_epoch))
        return steps if self.train.max_steps is None else min(steps, self.train.max_steps)
