"""MAKE's objective on one image and several texts a sample."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dermray import models
from dermray.corpus.manifest import Manifest
from dermray.errors import ConfigError, ModelError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import portable
from dermray.losses import MakeLoss, cached_backward
from dermray.losses.gather import world
from dermray.losses.make import local_vectors
from dermray.losses.make.loss import Kinds
from dermray.losses.soft import beta_at
from dermray.progress import print_line
from dermray.train.objectives.contract import Autocast, Built, Figure, Outcome
from dermray.train.objectives.contrastive import parts
from dermray.train.objectives.contrastive.cost import FlopModel, flop_model
from dermray.train.objectives.contrastive.diagnoses import DIAGNOSIS, numbers_of, similarity_of, tree_of
from dermray.train.objectives.contrastive.module import TEXT_TOKENS, Contrastive, text_labels
from dermray.train.objectives.contrastive.settings import LossConfig
from dermray.train.objectives.contrastive.views import PIXELS, TOKENS
from dermray.train.objectives.make.knowledge import Distillation, KnowledgeEncoder, require_same_texts
from dermray.train.objectives.make.settings import MakeConfig
from dermray.train.objectives.make.sizes import sizes_of
from dermray.train.objectives.make.towers import may_give_patches, no_patches
from dermray.train.objectives.make.views import IMAGE_GROUP, VALID, ImageAndTexts
from dermray.train.settings import PretrainConfig

# Pixels of a step's images, over those of the model's own size.
IMAGE_AREA = "image_area"


def check(config: PretrainConfig) -> None:
    """Refuse keys that mean nothing here, a model that is not there or gives no patches, and a tree that is not there.

    Raises:
        ConfigError: keys of other objectives, or mode=released with several workers.
        ModelError: names the model.
        CorpusError: a corpus has no disease tree, or they contradict each other, and diagnoses are asked for.
    """
    settings = _settings(config)
    if config.loss != LossConfig() or config.data.captions != DataConfig().captions:
        raise ConfigError(
            "objective.kind=make reads all texts of a sample and has keys of its own (objective.*): leave out loss.* "
            "and data.captions"
        )
    if settings.mode == "released" and config.most_workers > 1:
        raise ConfigError(
            "objective.mode=released is for num_workers=1: the released code fails on several; use mode=intended"
        )
    models.check(config.model, **config.initial_weights())
    model_cfg = models.architecture(config.model)
    if not may_give_patches(model_cfg):
        raise no_patches(config.model, "its vision tower")
    if model_cfg.get("init_logit_bias") is not None:
        raise ModelError(
            f"the model {config.model!r} has a logit bias, which objective.kind=make does not train; take one without"
        )
    parts.require_lockable(model_cfg, config.train)
    sizes_of(settings, model_cfg, config.model, config.seed)
    if settings.knowledge is not None:
        require_same_texts(settings.knowledge, config.model, config.pretrained_text)
    if settings.reads_diagnoses:
        tree_of(config)
    for uri in config.corpus_uris if settings.sub_captions else ():
        if "sub" not in Manifest.load(uri).provenance.get("captions", {}):
            print_line(
                f"pretrain: objective.sub_captions={settings.sub_captions}, and {uri} has none: an image is compared "
                f"with three texts and the empty one; prepare it with sub_captions={settings.sub_captions}, or give "
                "objective.sub_captions=0"
            )


def build(config: PretrainConfig, device: torch.device) -> Built:
    """Both towers with their initial weights, and what trains, validates and exports them.

    Raises:
        ModelError: as in `check`; or the vision tower gives no patches.
        DermRayError: the validation split or the disease tree cannot be read.
    """
    # The driver, which only checks, does without open_clip.
    from dermray.train.objectives.contrastive.validation import validator_of
    from dermray.train.objectives.make.patches import give_patches

    settings = _settings(config)
    model, image_transform, tokenizer = models.create(config.model, **config.initial_weights())
    model_cfg = models.architecture(config.model)
    parts.lock(model, config.train)
    preprocess = models.preprocessing(model)
    context_length = model_cfg["text_cfg"].get("context_length", 77)
    flops = flop_model(model, image_size=preprocess.size, context_length=context_length)
    give_patches(model, config.model)
    tokens = portable(functools.partial(models.tokenizer, config.model, config.pretrained_text))
    tree = tree_of(config) if settings.reads_diagnoses else None
    similarity = None
    if tree is not None and settings.soft_targets:
        similarity = torch.from_numpy(similarity_of(tree)).to(device)
    knowledge = None
    if settings.knowledge is not None:
        knowledge = KnowledgeEncoder(settings.knowledge, device, config.train.micro_batch_size)
    return Built(
        model=model.to(device).train(),
        objective=Make(
            preprocess.mean,
            preprocess.std,
            device,
            ColorAugmentation(config.data, config.seed),
            settings,
            Fixed(similarity, knowledge, preprocess.size),
            config.train.micro_batch_size,
            flops,
        ),
        views=ImageAndTexts(
            config.data,
            preprocess.size,
            tokens,
            settings.sub_captions,
            {} if tree is None else numbers_of(tree),
            sizes_of(settings, model_cfg, config.model, config.seed),
        ),
        export=functools.partial(_export, model_cfg),
        validate=validator_of(config, image_transform, tokenizer),
        groups=parts.groups(model, config.optim.factors),
    )


@dataclass(frozen=True)
class Fixed:
    """What the objective is given and does not train.

    Attributes:
        similarity: of diagnoses, `[C, C]` on the device, for soft targets.
        knowledge: a text encoder to be like.
        image_size: side of an image that the model is made for, in pixels.
    """

    similarity: Tensor | None = None
    knowledge: KnowledgeEncoder | None = None
    image_size: int | None = None


class Make(Contrastive):
    """As the contrastive objective, with several texts of a sample and its patches."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        color: ColorAugmentation,
        settings: MakeConfig,
        fixed: Fixed | None = None,
        micro_batch_size: int | None = None,
        flops: FlopModel | None = None,
    ) -> None:
        super().__init__(mean, std, device, color, micro_batch_size=micro_batch_size, flops=flops)
        self._settings = settings
        self._fixed = fixed or Fixed()
        self._make = MakeLoss(
            settings.lambda_m,
            settings.lambda_s,
            settings.sigma,
            settings.weights,
            **settings.model_dump(include={"negatives", "mode", "temperature", "beta", "divergence"}),
        )

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        """The gradient of the whole batch.

        Patches are summed up where they are made, so that those of a micro-batch at most are kept. Equal texts of a
        micro-batch, the empty one among them, go through their tower once and stay as many columns as they are.
        """
        from dermray.models import texts

        tokens = batch[TOKENS].long()
        num, num_texts, _ = tokens.shape
        # What weighs the patches of each image: its raw caption; the released code takes the first rows of all texts.
        drivers = tokens.flatten(0, 1)[:num] if self._settings.mode == "released" else tokens[:, 0]
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        distil = self._distillation(batch, tokens, device, autocast)
        num_tokens = 0

        def encode(pixels: Tensor, tokens: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
            nonlocal num_tokens
            levels = self._color(pixels, epoch=batch.epoch, samples=draws.numpy())
            rows, index = texts.grouped(plain, tokens.flatten(0, 1), device)
            num_tokens += texts.num_positions(rows) if torch.is_grad_enabled() else 0
            image, patches, text, scale = model(levels.sub_(self._mean).div_(self._std), rows)
            text = texts.expanded(text, index).view(len(pixels), num_texts + 1, -1)
            return image, local_vectors(patches, text[:, -1], sigma=self._settings.sigma), text[:, :-1], scale

        def loss(image: Tensor, local: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            given = self._graded(batch, tokens, device)
            valid = batch[VALID].to(device, non_blocking=True)
            total = self._make.of_vectors(image, local, text, valid, scale, **given).total
            return total if distil is None else total + self._settings.lambda_k * distil(text, scale)

        value = cached_backward(
            encode,
            [
                batch[PIXELS].permute(0, 3, 1, 2).to(device, non_blocking=True),
                torch.cat([tokens, drivers[:, None]], dim=1),
                torch.from_numpy(batch.draws),
            ],
            loss,
            num_features=3,
            micro_batch_size=self._micro_batch_size,
            autocast=autocast,
            no_sync=model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext,
        )
        terms = self._make.terms
        assert terms is not None
        figures = {name: Figure(terms[name]) for name in ("mkcl", "local")}
        if distil is not None:
            figures["knowledge"] = Figure(distil.value)
        if self._settings.scale_jitter:
            figures[IMAGE_AREA] = Figure((batch[PIXELS].shape[1] / (self._fixed.image_size or 1)) ** 2)
        return Outcome(value, {TEXT_TOKENS: Figure(num_tokens / num, "max"), **figures})

    def flops(self, figures: Mapping[str, float]) -> float | None:
        """As of any two towers; images by their area. The frozen encoder of knowledge counts nothing."""
        if self._flops is None:
            return None
        return self._flops.of_step(1, figures[TEXT_TOKENS], figures.get(IMAGE_AREA, 1.0))

    def _distillation(
        self, batch: Batch, tokens: Tensor, device: torch.device, autocast: Autocast
    ) -> Distillation | None:
        """What compares a batch's texts with those of the frozen encoder; None without one."""
        if self._fixed.knowledge is None:
            return None
        # The raw caption, or the first text of a sample that has none.
        first = batch[VALID].int().argmax(dim=1)
        own = tokens[torch.arange(len(tokens)), first]
        kinds = [text_labels(own)] if "text" in self._settings.mask_duplicates else []
        kinds += [] if batch.samples is None else [torch.from_numpy(batch.samples)]
        labels = torch.stack(kinds, dim=1).to(device) if kinds else None
        return Distillation(self._fixed.knowledge(own, autocast), first.to(device), labels)

    def _graded(self, batch: Batch, tokens: Tensor, device: torch.device) -> dict[str, Any]:
        """What says which samples are like each other: soft targets, or labels of what is no negative."""
        if self._fixed.similarity is not None:
            beta = beta_at(self._settings.beta, batch.epoch, self._settings.curriculum_epochs)
            self._make.settings = replace(self._make.settings, beta=beta)
            return {"labels": batch[DIAGNOSIS].to(device), "similarity": self._fixed.similarity}
        asked = self._settings.mask_duplicates
        samples = [batch[IMAGE_GROUP]] if "image" in asked else []
        # An epoch may draw a sample twice.
        samples += [] if batch.samples is None else [torch.from_numpy(batch.samples)]
        samples += [alone_unless(batch[DIAGNOSIS] >= 0, batch[DIAGNOSIS])] if "diagnosis" in asked else []
        texts = None
        if "text" in asked:
            hashes = text_labels(tokens.flatten(0, 1)).view(tokens.shape[:2])
            texts = alone_unless(batch[VALID], hashes).to(device)
        if not samples and texts is None:
            return {}
        of_samples = torch.stack(samples, dim=1).to(device) if samples else None
        return {"kinds": Kinds(of_samples, texts)}


def alone_unless(known: Tensor, labels: Tensor) -> Tensor:
    """Labels, where unknown ones are replaced by numbers that equal nothing on any rank: `[n, …]` → `[n, …]`."""
    first = world()[0] * labels.numel()
    own = torch.arange(first, first + labels.numel()).view(labels.shape)
    return torch.where(known, labels, -2 - own)


def _settings(config: PretrainConfig) -> MakeConfig:
    assert isinstance(config.objective, MakeConfig)
    return config.objective


def _export(model_cfg: dict[str, Any], model: nn.Module, uri: str, provenance: dict[str, Any]) -> str:
    return models.save(model, uri, model_cfg=model_cfg, provenance=provenance)
