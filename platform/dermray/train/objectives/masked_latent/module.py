"""CAE v2's objective on images alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray.errors import ConfigError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.settings import DataConfig
from dermray.losses import MaskedLatentAlignmentLoss
from dermray.losses.masked_latent import token_distances
from dermray.models import panderm_encoder, weights
from dermray.models.cae import CaeV2, drop_path_rates, reordered
from dermray.models.panderm import of_tower
from dermray.models.panderm_encoder import PanDermConfig
from dermray.train import numerics
from dermray.train.objectives.contract import Autocast, Built, Figure, Objective, Outcome, ParameterGroup
from dermray.train.objectives.contrastive.settings import LossConfig
from dermray.train.objectives.masked_latent import cost
from dermray.train.objectives.masked_latent.settings import EMA, MaskedLatentConfig
from dermray.train.objectives.masked_latent.towers import check_start, check_teacher, encoder_of
from dermray.train.objectives.masked_latent.views import KEPT, MASK, PIXELS, TEACHER_PIXELS, MaskedImage
from dermray.train.optimiser import learning_rate
from dermray.train.settings import PretrainConfig

# Of a checkpoint that starts a run, what it may lack: the rest of CAE v2 beside its encoder.
COMPANIONS = ("regresser.", "decoder.", "mask_token")
FOREIGN = ("teacher.", "head.", "rd_pos_embed")
TABLES = ("encoder.pos_embed", "rd_pos_embed")
# Below them features of different images are the same for any use: share of their length that differs, dimensions.
LEAST_SPREAD, LEAST_RANK = 0.001, 1.5


def check(config: PretrainConfig) -> None:
    """Refuse keys that mean nothing here, an encoder that is none, and weights or a teacher that are not there.

    Raises:
        ConfigError: names the keys.
        ModelError: names the teacher or the weights.
    """
    settings = _settings(config)
    encoder_of(config)
    if config.loss != LossConfig() or config.data.captions != DataConfig().captions:
        raise ConfigError("objective.kind=masked_latent learns from images alone: leave out loss.* and data.captions")
    if config.pretrained is not None or config.pretrained_text is not None:
        raise ConfigError(
            "objective.kind=masked_latent starts from an image encoder: give its weights as pretrained_image, and "
            "leave out pretrained and pretrained_text"
        )
    if config.train.channels_last:
        raise ConfigError(
            "train.channels_last is for convolutions over images, which objective.kind=masked_latent has none of"
        )
    check_start(config.pretrained_image)
    check_teacher(settings)


def build(config: PretrainConfig, device: torch.device) -> Built:
    """Encoder, regressor and teacher, and what trains, validates and exports them.

    Raises:
        ModelError: as in `check`; or weights that do not fit.
        DermRayError: the validation split cannot be read.
    """
    from dermray.train.objectives.masked_latent.teachers import AverageTeacher, ClipTeacher, Teacher
    from dermray.train.objectives.masked_latent.validation import validator_of

    settings, size = _settings(config), encoder_of(config)
    mean, std = (
        torch.tensor(each, device=device).view(1, 3, 1, 1) * 255 for each in (panderm_encoder.MEAN, panderm_encoder.STD)
    )
    foreign = None
    if settings.teacher != EMA:
        foreign = ClipTeacher(settings.teacher, settings.teacher_pretrained, settings.grid, device)
    torch.manual_seed(config.seed)
    model = CaeV2(
        settings.image_size,
        settings.patch_size,
        size.width,
        size.layers,
        size.heads,
        settings.regressor_layers,
        size.width if foreign is None else foreign.width,
        layer_scale=settings.layer_scale or size.layer_scale,
    )
    if config.pretrained_image is not None:
        start_from(model, config.pretrained_image)
    # It is applied nowhere.
    model.regresser.norm.requires_grad_(False)
    model = model.to(device).train()
    teacher: Teacher = foreign or AverageTeacher(
        model.encoder, settings.teacher_decay, settings.teacher_layers, mean, std
    )
    flops = cost.of_sample(
        model, teacher.visual, settings.image_size, teacher.size or settings.image_size, settings.num_masked
    )
    if config.train.compile:
        for blocks in numerics.residual_stacks(teacher.visual):
            for block in blocks:
                block.compile()
    rates = drop_path_rates(settings.drop_path, size.layers, settings.regressor_layers) if settings.drop_path else []
    described = PanDermConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
    )
    color = ColorAugmentation(config.data, config.seed)
    return Built(
        model=model,
        objective=MaskedLatent(settings, teacher, color, mean, std, config.train.micro_batch_size, flops),
        views=MaskedImage(
            config.data,
            settings.image_size,
            teacher.size,
            settings.mask,
            settings.grid,
            settings.num_masked,
            tuple(rates),
        ),
        export=functools.partial(_export, described),
        validate=validator_of(config, settings, teacher, described),
        schedule=functools.partial(rate, config, settings),
        groups=groups(model, settings.decay),
    )


class MaskedLatent(Objective):
    """Predicts the teacher's tokens from visible patches; samples are independent: ranks and micro-batches add up."""

    def __init__(
        self,
        settings: MaskedLatentConfig,
        teacher: Any,
        color: ColorAugmentation,
        mean: Tensor,
        std: Tensor,
        micro_batch_size: int | None = None,
        flops: float | None = None,
    ) -> None:
        self._settings, self._teacher, self._color = settings, teacher, color
        self._mean, self._std, self._micro_batch_size = mean, std, micro_batch_size
        self._loss = MaskedLatentAlignmentLoss(settings.masked_weight, settings.visible_weight)
        self._flops = flops
        self._num_samples = 0

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        """The gradient of the whole batch, by micro-batches if there are some; ranks talk at the last."""
        self._num_samples = len(batch.draws)
        step = self._micro_batch_size or self._num_samples
        starts = range(0, self._num_samples, step)
        sums: dict[str, Tensor] = {}
        for start in starts:
            alone = start != starts[-1] and isinstance(model, DistributedDataParallel)
            with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
                given = self._of_part(model, batch, slice(start, start + step), device, autocast)
            sums = {name: value + sums.get(name, 0) for name, value in given.items()}
        loss = sums.pop("loss")
        return Outcome(loss, {name: Figure(value) for name, value in sums.items()})

    def _of_part(
        self, model: nn.Module, batch: Batch, rows: slice, device: torch.device, autocast: Autocast
    ) -> dict[str, Tensor]:
        """Add the gradient of some of the batch's samples; loss and figures by their share of the batch."""
        draws, mask = batch.draws[rows], batch[MASK][rows].to(device, non_blocking=True)
        share = len(draws) / len(batch.draws)

        def levels(name: str) -> Tensor:
            pixels = batch[name][rows].permute(0, 3, 1, 2).to(device, non_blocking=True)
            return self._color(pixels, epoch=batch.epoch, samples=draws)

        seen = levels(PIXELS)
        with torch.no_grad(), autocast():
            target = reordered(self._teacher(seen if self._teacher.size is None else levels(TEACHER_PIXELS)), mask)
        kept = batch[KEPT][rows].to(device, non_blocking=True) if KEPT in batch.arrays else None
        with autocast():
            pixels = (seen - self._mean) / self._std
            prediction = model(pixels, mask, num_masked=self._settings.num_masked, kept=kept)
        loss = self._loss(prediction, target, mask) * share
        loss.backward()
        figures = {"loss": loss.detach(), **self._figures(prediction.detach(), target, mask)}
        return {name: value if name == "loss" else share * value for name, value in figures.items()}

    def _figures(self, prediction: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Cosines of kinds of tokens with their targets, and how far apart targets lie: 0 where all are the same."""
        cosines = 1 - token_distances(prediction, target)
        masked = self._settings.num_masked
        return {
            "class_cosine": cosines[:, 0].mean(),
            "visible_cosine": cosines[:, 1:-masked].mean(),
            "masked_cosine": cosines[:, -masked:].mean(),
            "target_spread": (1 - target.mean(dim=(0, 1)).square().sum()).clamp(min=0),
        }

    def after_step(self, model: nn.Module, taken: Tensor) -> None:
        """Move the average, where it is the teacher."""
        if self._settings.teacher == EMA:
            self._teacher.follow(model.encoder, self._num_samples, taken)

    def flops(self, figures: Mapping[str, float]) -> float | None:
        """Of encoder, regressor and head forward and backward, and of the teacher forward."""
        return self._flops

    def verdict(self, scores: Mapping[str, float]) -> str:
        """What the scores of a validation mean, where they mean that the features have collapsed."""
        spread, dimensions = scores.get("validation_spread"), scores.get("validation_effective_rank")
        if spread is None or dimensions is None or not (spread < LEAST_SPREAD or dimensions < LEAST_RANK):
            return ""
        return (
            f"the features have collapsed: those of different images are nearly the same (spread {spread:.3f}, "
            f"effective rank {dimensions:.1f}); lower optim.lr, or take another teacher (objective.teacher)"
        )

    def state(self) -> dict[str, Any]:
        """Of the average and its centre; a frozen teacher has none."""
        return self._teacher.state() if self._settings.teacher == EMA else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        if self._settings.teacher == EMA:
            self._teacher.restore(state)


def rate(config: PretrainConfig, settings: MaskedLatentConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step: linear warm-up from 0, then half a cosine that ends at `min_lr`."""
    peak, warmup = config.optim.lr, config.optim.warmup_steps
    if settings.warmup_epochs is not None:
        warmup = round(num_steps * settings.warmup_epochs / config.train.epochs)
    share = learning_rate(step, peak=1.0, warmup_steps=warmup, num_steps=num_steps)
    end = min(settings.min_lr, peak) if step >= warmup else 0.0
    return end + (peak - end) * share


def groups(model: nn.Module, decay: str) -> tuple[ParameterGroup, ParameterGroup]:
    """Trained parameters that do not decay, and those that do.

    Published: vectors and biases do not. Class and mask token are matrices to the public code (`decay="released"`), and
    are meant to be exempt.
    """
    exempt: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_token = name.endswith(("cls_token", "mask_token")) and decay == "intended"
            (exempt if parameter.ndim < 2 or name.endswith(".bias") or is_token else decayed).append(parameter)
    return ParameterGroup(exempt, weight_decay=0.0), ParameterGroup(decayed)


def start_from(model: CaeV2, source: str) -> None:
    """Fill a model from a checkpoint of PanDerm or CAE v2, or of an encoder alone.

    What is beside the encoder may be missing, or lead to a teacher of another width: it keeps its initial weights then.
    Position tables are computed, so that the checkpoint may be of another image size.

    Raises:
        ModelError: the encoder's weights do not fit.
    """
    given, own = weights.read(source), model.state_dict()
    tower = {key: value for key, value in of_tower(given).items() if not key.startswith((*COMPANIONS, *FOREIGN))}
    fitting = {key for key in given if key.startswith(COMPANIONS) and key in own and given[key].shape == own[key].shape}
    state = {f"encoder.{key}": value for key, value in tower.items()} | {key: given[key] for key in fitting}
    state |= {table: own[table] for table in TABLES}
    weights.load(model, state, source=source, optional=COMPANIONS)


def _settings(config: PretrainConfig) -> MaskedLatentConfig:
    assert isinstance(config.objective, MaskedLatentConfig)
    return config.objective


def _export(described: PanDermConfig, model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return panderm_encoder.write(model.state_dict(), uri, described, provenance)
