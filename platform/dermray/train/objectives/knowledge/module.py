"""A text tower that learns to tell the nodes of the disease tree apart, by metric learning over texts about them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray import models
from dermray.errors import ConfigError
from dermray.ingest.loader import Batch
from dermray.ingest.tokens import portable
from dermray.losses import AdaSpLoss, cached_backward
from dermray.train.objectives.contract import Autocast, Built, Figure, Objective, Outcome
from dermray.train.objectives.contrastive.diagnoses import tree_of
from dermray.train.objectives.contrastive.module import TEXT_TOKENS
from dermray.train.objectives.contrastive.parts import part_of
from dermray.train.objectives.contrastive.views import TOKENS
from dermray.train.objectives.knowledge.nodes import said_of
from dermray.train.objectives.knowledge.settings import KnowledgeConfig
from dermray.train.objectives.knowledge.views import NODE, NodeTexts
from dermray.train.settings import PretrainConfig


def check(config: PretrainConfig) -> None:
    """Refuse a model that is not there, a corpus without a disease tree, and validation, which there is none of.

    Raises:
        ConfigError: the run is to be validated.
        ModelError: names the model.
        CorpusError: a corpus has no disease tree, or they contradict each other.
    """
    if config.validation.every_steps:
        raise ConfigError("objective.kind=knowledge looks at no image and has no validation: leave out validation.*")
    models.check(config.model, **config.initial_weights())
    tree_of(config)


def build(config: PretrainConfig, device: torch.device) -> Built:
    """A model whose text tower is trained; its vision tower stays as it begins.

    Raises:
        ModelError, CorpusError: as in `check`.
    """
    settings = config.objective
    assert isinstance(settings, KnowledgeConfig)
    model, _, _ = models.create(config.model, **config.initial_weights())
    texts_alone(model)
    tree = tree_of(config)
    names = list(tree)
    return Built(
        model=model.to(device).train(),
        objective=Knowledge(settings.temperature, config.train.micro_batch_size),
        views=NodeTexts(
            portable(functools.partial(models.tokenizer, config.model, config.pretrained_text)),
            settings.texts,
            {name: number for number, name in enumerate(names)},
            [said_of(tree, name) for name in names],
        ),
        export=functools.partial(_export, models.architecture(config.model)),
    )


class _TextsAlone(nn.Module):
    """`forward` of a model of open_clip's that sees texts alone."""

    def forward(self, rows: Any) -> Tensor:
        """L2-normalised texts `[M, D]` of what `models.texts.grouped` gives."""
        model: Any = self
        return model.encode_text(rows, normalize=True)


def texts_alone(model: nn.Module) -> None:
    """Let a model's `forward` take texts alone and all but its text tower stay as it is, in place; names stay."""
    for name, parameter in model.named_parameters():
        if part_of(name) != "text":
            parameter.requires_grad_(False)
    given = type(model)
    model.__class__ = type(f"{given.__name__}OfTextsAlone", (_TextsAlone, given), {})


class Knowledge(Objective):
    """Texts of one node lie together; those of a micro-batch go through the tower at once."""

    def __init__(self, temperature: float, micro_batch_size: int | None = None) -> None:
        self._loss = AdaSpLoss(temperature)
        self._micro_batch_size = micro_batch_size

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        """The gradient of the whole batch; equal texts of a micro-batch are encoded once."""
        from dermray.models import texts

        tokens, nodes = batch[TOKENS].long(), batch[NODE].to(device, non_blocking=True)
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        num_tokens = 0

        def encode(_: Tensor, tokens: Tensor) -> tuple[Tensor]:
            nonlocal num_tokens
            rows, index = texts.grouped(plain, tokens.flatten(0, 1), device)
            num_tokens += texts.num_positions(rows) if torch.is_grad_enabled() else 0
            return (texts.expanded(model(rows), index).view(*tokens.shape[:2], -1),)

        def loss(features: Tensor) -> Tensor:
            return self._loss(features.flatten(0, 1), nodes.repeat_interleave(features.shape[1]))

        value = cached_backward(
            encode,
            # The first one says on which device random numbers are drawn.
            [nodes, tokens],
            loss,
            num_features=1,
            micro_batch_size=self._micro_batch_size,
            autocast=autocast,
            no_sync=model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext,
        )
        return Outcome(value, {TEXT_TOKENS: Figure(num_tokens / len(tokens), "max")})


def _export(model_cfg: dict[str, Any], model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return models.save(model, uri, model_cfg=model_cfg, provenance=provenance)
