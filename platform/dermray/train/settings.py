"""Keys of a pretraining run: one typed tree, of which every recipe in `jobs/configs/` is an instance."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dermray.config import ClusterConfig, Config, TrackingConfig
from dermray.ingest.settings import DataConfig

Precision = Literal["auto", "fp32", "bf16"]


class TrainConfig(Config):
    """The loop."""

    epochs: float = Field(30, gt=0, description="passes over the split; a fraction cuts the last one")
    max_steps: int | None = Field(
        None, ge=1, description="end after so many optimiser steps; empty: train.epochs decides"
    )
    global_batch_size: int = Field(4096, ge=1, description="samples of one optimiser step over all workers")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples of a worker that go through the towers at once; empty: all"
    )
    precision: Precision = Field("auto", description="auto: bf16 autocast on GPU, fp32 on CPU")
    grad_clip_norm: float | None = Field(None, gt=0, description="clip the global gradient norm; empty: no clipping")
    tf32: bool = Field(True, description="float32 products on a GPU run in TF32")
    channels_last: bool = Field(False, description="images and vision tower in channels-last layout")
    compile: bool = Field(False, description="torch.compile the towers, block by block; the first steps are slow")
    grad_checkpointing: float = Field(
        0.0, ge=0, le=1, description="share of each tower's blocks that are recomputed in the backward pass"
    )
    grad_checkpointing_keeps: Literal["nothing", "products"] = Field(
        "nothing",
        description="of recomputed blocks; products: results of matrix products and attention, so little runs again",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the weights with this decay a step, validate and export the average"
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="so many steps in a row may be left out for gradients that are not finite"
    )
    log_every_steps: int = Field(10, ge=1, description="cadence of the progress line and of MLflow metrics")
    checkpoint_every_steps: int = Field(200, ge=1, description="cadence of checkpoints")
    checkpoint_every_minutes: float | None = Field(
        None, gt=0, description="also a checkpoint when the last one is so old; empty: by steps only"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints stay")
    keep_best: str | None = Field(
        None, description="validation score (validation_zero_shot_accuracy, …) whose best checkpoint stays too"
    )
    keep_best_mode: Literal["max", "min"] = Field("max", description="whether the highest or the lowest is best")
    grace_s: float = Field(
        60, gt=0, description="seconds for the last checkpoint after SIGTERM; then the run is aborted"
    )
    resize_every_s: float = Field(
        60, gt=0, description="with num_workers=[least, most]: how often to look whether another number fits"
    )
    max_failures: int = Field(3, ge=-1, description="restarts after a lost worker or node; -1: without limit")
    collective_timeout_s: int = Field(600, ge=10, description="a collective that takes longer fails the attempt")


class LossConfig(Config):
    """What is compared with what."""

    name: Literal["clip", "siglip"] = Field("clip", description="clip: softmax over the global batch; siglip: sigmoid")
    method: Literal["local", "dense", "tiled"] = Field(
        "tiled", description="of clip: tiled (least memory), local (own rows whole) or dense (the whole matrix)"
    )
    mask_duplicates: bool = Field(False, description="samples with the same text are not negatives of each other")


class OptimConfig(Config):
    """AdamW with open_clip's parameter groups; linear warm-up, then cosine to zero."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; biases, norms and logit_scale are exempt")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW beta2")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup_steps: int = Field(1000, ge=0, description="steps of linear warm-up")


class ValidationConfig(Config):
    """Scores on held-out samples during training."""

    every_steps: int | None = Field(None, ge=1, description="cadence; empty: no validation while training")
    split: str = Field("val", description="split of the corpus to score on")
    max_samples: int = Field(512, ge=1, description="score the first so many samples of the split")


class PretrainConfig(Config):
    """Everything `jobs/pretrain.py` can be told."""

    corpus: str = Field(description="URI of a prepared corpus")
    output: str = Field(description="URI for checkpoints and the model folder; the same URI again resumes")
    model: str = Field("ViT-B-16", description="open_clip architecture, one of ours, or a model folder to start from")
    pretrained: str | None = Field(
        None, description="weights to start from: open_clip tag, checkpoint path or URI, or hf-hub:ORG/NAME"
    )
    pretrained_image: str | None = Field(
        None, description="checkpoint of the vision tower alone: path, URI or hf-hub:ORG/NAME"
    )
    pretrained_text: str | None = Field(
        None, description="checkpoint of the language model in a Hugging Face text tower: path, URI or hf-hub:ORG/NAME"
    )
    toy: bool = Field(False, description="true: shrink the recipe to a minute on a CPU (docs/training.md says how)")
    run_name: str | None = Field(None, description="name of the run in MLflow; empty: from model and output")
    resume: Literal["same", "force"] = Field(
        "same", description="force: go on from output's checkpoint although corpus or settings differ"
    )
    seed: int = Field(0, ge=0, description="of initial weights, order and augmentation")
    num_workers: int | tuple[int, int] = Field(
        1, description="training workers (data-parallel ranks); [least, most]: as many as there is room for"
    )
    use_gpu: bool | None = Field(None, description="empty: if the cluster has GPUs")
    cpus_per_worker: float | None = Field(
        None, gt=0, description="logical CPUs a worker reserves; empty: 1 with a GPU, else half of the cluster shared"
    )
    threads_per_worker: int | None = Field(
        None, ge=1, description="threads that a worker computes with on a CPU; empty: cores over num_workers"
    )
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_or_two_counts(cls, value: Any) -> Any:
        counts = list(value) if isinstance(value, list | tuple) else [value]
        numbers = all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts)
        if not numbers or len(counts) not in (1, 2) or counts != sorted(counts):
            raise ValueError(f"needs a number from 1 on, or [least, most], got {value!r}")
        return counts[0] if len(counts) == 1 else tuple(counts)

    @model_validator(mode="after")
    def _best_needs_scores(self) -> PretrainConfig:
        if self.train.keep_best is not None and self.validation.every_steps is None:
            raise ValueError("train.keep_best needs validation.every_steps")
        return self

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

    def samples_at_once(self, world_size: int) -> int:
        """How many samples of a worker go through the towers together."""
        of_worker = self.train.global_batch_size // world_size
        return min(of_worker, self.train.micro_batch_size or of_worker)

    def trajectory(self) -> dict[str, Any]:
        """The keys that decide which weights come out; a resumed run must agree on all of them."""
        data = self.data.model_dump(mode="json", exclude={"cpus_per_task", "tasks_per_worker"})
        return {
            "model": self.model,
            "pretrained": self.pretrained,
            "pretrained_image": self.pretrained_image,
            "pretrained_text": self.pretrained_text,
            "seed": self.seed,
            "train.epochs": self.train.epochs,
            "train.max_steps": self.train.max_steps,
            "train.global_batch_size": self.train.global_batch_size,
            "train.precision": self.train.precision,
            "train.grad_clip_norm": self.train.grad_clip_norm,
            "train.ema_decay": self.train.ema_decay,
            "loss.name": self.loss.name,
            "loss.mask_duplicates": self.loss.mask_duplicates,
            **{f"data.{key}": value for key, value in data.items()},
            **{f"optim.{key}": value for key, value in self.optim.model_dump(mode="json").items()},
        }

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
