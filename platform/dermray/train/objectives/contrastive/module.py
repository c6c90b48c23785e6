"""CLIP's or SigLIP's objective on one image and one caption a sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray import models
from dermray.errors import ModelError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.tokens import portable
from dermray.losses import ClipLoss, Graded, SigLipLoss, cached_backward
from dermray.losses.soft import beta_at
from dermray.train.objectives.contract import Autocast, Built, Figure, Objective, Outcome
from dermray.train.objectives.contrastive import parts
from dermray.train.objectives.contrastive.cost import FlopModel, flop_model
from dermray.train.objectives.contrastive.diagnoses import DIAGNOSIS, numbers_of, similarity_of, tree_of
from dermray.train.objectives.contrastive.settings import LossConfig
from dermray.train.objectives.contrastive.views import PIXELS, TOKENS, ImageAndCaption
from dermray.train.settings import PretrainConfig

MAX_LOGIT_SCALE = math.log(100)
# Zhai et al., 2023: nearly all pairs are negatives, and the bias begins where that is the expectation.
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
# Positions that the text tower went over, a sample; a text that is encoded once for several samples counts once.
TEXT_TOKENS = "text_tokens"

_MASK64 = (1 << 64) - 1


def check(config: PretrainConfig) -> None:
    """Refuse a model that is not there, that the loss does not fit, or whose towers cannot be locked so.

    Raises:
        ModelError: names it.
        CorpusError: a corpus has no disease tree, or they contradict each other, and soft targets are asked for.
    """
    models.check(config.model, **config.initial_weights())
    model_cfg = models.architecture(config.model)
    trained_architecture(model_cfg, config.loss)
    parts.require_lockable(model_cfg, config.train)
    if config.loss.soft_targets:
        tree_of(config)


def build(config: PretrainConfig, device: torch.device) -> Built:
    """Both towers with their initial weights, and what trains, validates and exports them.

    Raises:
        ModelError: as in `check`.
        DermRayError: the validation split or the disease tree cannot be read.
    """
    # The driver, which only checks, does without open_clip.
    from dermray.train.objectives.contrastive.validation import validator_of

    model, image_transform, tokenizer = models.create(config.model, **config.initial_weights())
    model_cfg = models.architecture(config.model)
    fit_to_loss(model, model_cfg, config.loss)
    parts.lock(model, config.train)
    preprocess = models.preprocessing(model)
    flops = flop_model(
        model, image_size=preprocess.size, context_length=model_cfg["text_cfg"].get("context_length", 77)
    )
    tokens = portable(functools.partial(models.tokenizer, config.model, config.pretrained_text))
    tree = tree_of(config) if config.loss.soft_targets else None
    return Built(
        model=model.to(device).train(),
        objective=Contrastive(
            preprocess.mean,
            preprocess.std,
            device,
            ColorAugmentation(config.data, config.seed),
            config.loss,
            config.train.micro_batch_size,
            flops,
            None if tree is None else torch.from_numpy(similarity_of(tree)).to(device),
        ),
        views=ImageAndCaption(config.data, preprocess.size, tokens, None if tree is None else numbers_of(tree)),
        export=functools.partial(_export, trained_architecture(model_cfg, config.loss)),
        validate=validator_of(config, image_transform, tokenizer),
        groups=parts.groups(model, config.optim.factors),
    )


def _export(model_cfg: dict[str, Any], model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return models.save(model, uri, model_cfg=model_cfg, provenance=provenance)


class Contrastive(Objective):
    """Augments and normalises on the device, runs both towers by micro-batches, compares globally."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        color: ColorAugmentation,
        loss: LossConfig | None = None,
        micro_batch_size: int | None = None,
        flops: FlopModel | None = None,
        similarity: Tensor | None = None,
    ) -> None:
        settings = loss or LossConfig()
        self._loss_settings = settings
        self._similarity = similarity
        self._color = color
        self._loss = SigLipLoss() if settings.name == "siglip" else ClipLoss(settings.method)
        self._micro_batch_size = micro_batch_size
        self._flops = flops
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        """The gradient of the whole batch.

        Texts go through their tower without needless padding, and equal ones of a micro-batch once: gradients stay. Two
        draws of one sample, perhaps with different captions, are no negatives of each other; with soft targets they
        share the target.
        """
        from dermray.models import texts

        tokens = batch[TOKENS].long()
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        num_tokens = 0

        def encode(pixels: Tensor, tokens: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
            nonlocal num_tokens
            levels = self._color(pixels, epoch=batch.epoch, samples=draws.numpy())
            rows, index = texts.grouped(plain, tokens, device)
            num_tokens += texts.num_positions(rows) if torch.is_grad_enabled() else 0
            # In place: the levels are a copy already, and a batch of them is the largest thing that a CPU moves.
            image, text, *scalars = model(levels.sub_(self._mean).div_(self._std), rows)
            return image, texts.expanded(text, index), *scalars

        loss = cached_backward(
            encode,
            [
                batch[PIXELS].permute(0, 3, 1, 2).to(device, non_blocking=True),
                tokens,
                torch.from_numpy(batch.draws),
            ],
            functools.partial(self._loss, **self._alike(batch, tokens, device)),
            micro_batch_size=self._micro_batch_size,
            autocast=autocast,
            no_sync=model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext,
        )
        return Outcome(loss, {TEXT_TOKENS: Figure(num_tokens / len(tokens), "max")})

    def _alike(self, batch: Batch, tokens: Tensor, device: torch.device) -> dict[str, Any]:
        """What says which samples are like each other: soft targets, or labels of what is no negative."""
        if self._similarity is not None:
            settings = self._loss_settings
            labels = batch[DIAGNOSIS].to(device)
            beta = beta_at(settings.beta, batch.epoch, settings.curriculum_epochs)
            return {"graded": Graded(labels, self._similarity, settings.temperature, beta, settings.divergence)}
        kinds = [text_labels(tokens)] if self._loss_settings.mask_duplicates else []
        kinds += [] if batch.samples is None else [torch.from_numpy(batch.samples)]
        return {"labels": torch.stack(kinds, dim=1).to(device) if kinds else None}

    def after_step(self, model: nn.Module, taken: Tensor) -> None:
        """Clamp logit_scale to [0, ln 100] (Radford et al., 2021)."""
        with torch.no_grad():
            _logit_scale(model).clamp_(0, MAX_LOGIT_SCALE)

    def report(self, model: nn.Module) -> dict[str, float]:
        """The exponentiated logit scale and, where the model has one, the logit bias."""
        bias = getattr(model, "logit_bias", None)
        figures = {"logit_scale": float(_logit_scale(model).detach().exp())}
        return figures if bias is None else figures | {"logit_bias": float(bias.detach())}

    def flops(self, figures: Mapping[str, float]) -> float | None:
        """Of both towers, forward and backward; texts by the positions that were encoded."""
        return None if self._flops is None else self._flops.of_step(1, figures[TEXT_TOKENS])


def trained_architecture(model_cfg: dict[str, Any], loss: LossConfig) -> dict[str, Any]:
    """The `model_cfg` of what training leaves: SigLIP's loss gives a bias to a model that has none.

    Raises:
        ModelError: the model has a bias, which CLIP's loss would never train.
    """
    has_bias = model_cfg.get("init_logit_bias") is not None
    if loss.name == "clip" and has_bias:
        raise ModelError(
            f"the model has a logit bias (init_logit_bias={model_cfg['init_logit_bias']}), which the CLIP loss does "
            "not train; use loss.name=siglip, or a model without one"
        )
    return model_cfg if loss.name == "clip" or has_bias else model_cfg | SIGLIP_START


def fit_to_loss(model: nn.Module, model_cfg: dict[str, Any], loss: LossConfig) -> None:
    """Give a model of open_clip's the logit bias and scale of `trained_architecture` if SigLIP's loss needs them.

    Args:
        model: made of `model_cfg`; changed in place.
        model_cfg: of the model as it was loaded.
        loss: what it will be trained with.

    Raises:
        ModelError: as in `trained_architecture`.
    """
    trained = trained_architecture(model_cfg, loss)
    if trained is not model_cfg:
        scale = _logit_scale(model)
        with torch.no_grad():
            scale.fill_(trained["init_logit_scale"])
        model.logit_bias = nn.Parameter(torch.full_like(scale, trained["init_logit_bias"]))


def text_labels(tokens: Tensor) -> Tensor:
    """A number for every text, equal for equal tokens: int64 `[n, L]` → `[n]`; trailing zeros do not matter.

    A multilinear hash with fixed weights, so that ranks agree. It does not see padding: two ranks may pad to different
    lengths with token 0.
    """
    weights = torch.tensor([_weight(position) for position in range(tokens.shape[1])], device=tokens.device)
    return (tokens * weights).sum(dim=1)


@functools.cache
def _weight(position: int) -> int:
    """An odd number that looks random, as a signed 64-bit integer (SplitMix64)."""
    mixed = (position + 1) * 0x9E3779B97F4A7C15 & _MASK64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK64
    mixed = (mixed ^ mixed >> 31) | 1
    return mixed - (1 << 64) if mixed >> 63 else mixed


def _logit_scale(model: nn.Module) -> Tensor:
    scale = model.logit_scale
    assert isinstance(scale, Tensor)
    return scale
