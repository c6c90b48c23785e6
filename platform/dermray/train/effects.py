"""Settings of a pretraining that cannot do what they say: told before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from dermray.model_uri import HUB_PREFIX, folder_uri
from dermray.train.objectives import kinds
from dermray.train.optimiser import scheduled
from dermray.train.settings import PretrainConfig


def without_effect(config: PretrainConfig, num_steps: int, steps_per_epoch: int | None = None) -> list[str]:
    """A line for each setting that comes to nothing, or to less.

    Args:
        config: of the run.
        num_steps: that it has.
        steps_per_epoch: of them; empty: the run is one epoch.
    """
    cooldown = _of_the_cooldown(config, num_steps, config.optim.cooldown_steps(steps_per_epoch or num_steps))
    return [*_of_the_length(config, num_steps), *cooldown, *_of_other_keys(config)]


def _of_the_cooldown(config: PretrainConfig, num_steps: int, cooldown_steps: int) -> Iterator[str]:
    after_warmup = num_steps - config.optim.warmup_steps
    if cooldown_steps > max(0, after_warmup):
        yield (
            f"optim.cooldown_epochs={config.optim.cooldown_epochs:g} are {cooldown_steps} steps, and after its warm-up "
            f"the run has {max(0, after_warmup)}: the learning rate never stays at its peak"
        )


def _of_the_length(config: PretrainConfig, num_steps: int) -> Iterator[str]:
    train, optim, run = config.train, config.optim, f"the run of {num_steps} steps"
    if optim.warmup_steps >= num_steps:
        rate = scheduled(optim, num_steps)(num_steps - 1, num_steps)
        yield (
            f"optim.warmup_steps={optim.warmup_steps} is longer than {run}: the learning rate comes to "
            f"{rate / optim.lr:.1%} of optim.lr and never to its peak; lower it"
        )
    every = config.validation.every_steps
    if every is not None and every > num_steps:
        yield f"validation.every_steps={every} is beyond {run}: there is one validation, at the end"
    if train.checkpoint_every_steps is not None and train.checkpoint_every_steps > num_steps:
        minutes = train.checkpoint_every_minutes
        yield (
            f"train.checkpoint_every_steps={train.checkpoint_every_steps} is beyond {run}: there is a checkpoint "
            f"{'' if minutes is None else f'every {minutes:g} minutes and '}at the end"
        )
    if train.log_every_steps > num_steps:
        yield f"train.log_every_steps={train.log_every_steps} is beyond {run}: only the last step is shown"
    if train.max_steps is not None and train.max_steps > num_steps:
        yield f"train.max_steps={train.max_steps} is beyond {run}, which train.epochs={train.epochs:g} makes"


def _of_other_keys(config: PretrainConfig) -> Iterator[str]:
    train, of_worker = config.train, config.train.global_batch_size // config.most_workers
    given = train.model_fields_set
    if train.micro_batch_size is not None and train.micro_batch_size >= of_worker:
        yield f"train.micro_batch_size={train.micro_batch_size} has no effect: a worker has {of_worker} samples at once"
    if "grad_checkpointing_keeps" in given and train.grad_checkpointing == 0:
        yield "train.grad_checkpointing_keeps has no effect without train.grad_checkpointing"
    if "keep_best_mode" in given and train.keep_best is None:
        yield "train.keep_best_mode has no effect without train.keep_best"
    if "resize_every_s" in given and not config.elastic:
        yield "train.resize_every_s has no effect with a fixed num_workers; give num_workers=[least, most]"
    of_loss = ", ".join(f"loss.{key}" for key in sorted(config.loss.model_fields_set))
    if of_loss and config.objective.kind != kinds.DEFAULT:
        yield f"{of_loss}: no effect with objective.kind={config.objective.kind}"
    elif "method" in config.loss.model_fields_set and config.loss.name == "siglip":
        yield "loss.method has no effect with loss.name=siglip"
    if config.validation.model_fields_set and config.validation.every_steps is None:
        keys = ", ".join(f"validation.{key}" for key in sorted(config.validation.model_fields_set - {"every_steps"}))
        if keys:
            yield f"{keys}: no effect without validation.every_steps"
    brings_weights = config.model.startswith(HUB_PREFIX) or folder_uri(config.model) is not None
    if config.pretrained is not None and brings_weights:
        yield f"pretrained={config.pretrained} has no effect: model={config.model} brings its own weights"
