"""A task binds batch → model → loss → gradients, so that the loop knows none of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray.errors import ModelError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.losses import ClipLoss, SigLipLoss, cached_backward
from dermray.models import texts
from dermray.train.settings import LossConfig

MAX_LOGIT_SCALE = math.log(100)
# Zhai et al., 2023: nearly all pairs are negatives, and the bias begins where that is the expectation.
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}

_MASK64 = (1 << 64) - 1


class Task(Protocol):
    """What the training loop asks of an objective.

    Attributes:
        text_tokens: positions that the text tower went over in the last `backward`, a sample; a text that is encoded
            once for several samples counts once.
    """

    text_tokens: float

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Add the gradient of the rank's loss to the parameters and return the loss, detached.

        The mean of the losses over ranks is the global loss. `model` may be wrapped by DDP, whose ranks must have
        averaged their gradients on return. `autocast` makes the context in which the model runs forward.
        """

    def after_step(self, model: nn.Module) -> None:
        """Constrain parameters after an optimiser step; `model` is not wrapped."""

    def report(self, model: nn.Module) -> dict[str, float]:
        """Scalars of the model worth logging."""


class ContrastiveTask:
    """CLIP's or SigLIP's objective on one image and one caption a sample."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        color: ColorAugmentation,
        loss: LossConfig | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        settings = loss or LossConfig()
        self.text_tokens = 0.0
        self._color = color
        self._loss = SigLipLoss() if settings.name == "siglip" else ClipLoss(settings.method)
        self._mask_duplicates = settings.mask_duplicates
        self._micro_batch_size = micro_batch_size
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Augment and normalise uint8 pixels on the device, run both towers by micro-batches, compare globally.

        Texts go through their tower without needless padding, and equal ones of a micro-batch once: gradients stay.
        """
        labels = text_labels(batch.tokens).to(device) if self._mask_duplicates else None
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        num_tokens = 0

        def encode(pixels: Tensor, tokens: Tensor, samples: Tensor) -> tuple[Tensor, ...]:
            nonlocal num_tokens
            levels = self._color(pixels, epoch=batch.epoch, samples=samples.numpy())
            rows, index = texts.grouped(plain, tokens, device)
            num_tokens += texts.num_positions(rows) if torch.is_grad_enabled() else 0
            image, text, *scalars = model((levels - self._mean) / self._std, rows)
            return image, texts.expanded(text, index), *scalars

        loss = cached_backward(
            encode,
            [batch.pixels.to(device, non_blocking=True), batch.tokens, torch.from_numpy(batch.samples)],
            functools.partial(self._loss, labels=labels),
            micro_batch_size=self._micro_batch_size,
            autocast=autocast,
            no_sync=model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext,
        )
        self.text_tokens = num_tokens / len(batch.tokens)
        return loss

    def after_step(self, model: nn.Module) -> None:
        """Clamp logit_scale to [0, ln 100] (Radford et al., 2021)."""
        with torch.no_grad():
            _logit_scale(model).clamp_(0, MAX_LOGIT_SCALE)

    def report(self, model: nn.Module) -> dict[str, float]:
        """The exponentiated logit scale and, where the model has one, the logit bias."""
        bias = getattr(model, "logit_bias", None)
        figures = {"logit_scale": float(_logit_scale(model).detach().exp())}
        return figures if bias is None else figures | {"logit_bias": float(bias.detach())}


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
