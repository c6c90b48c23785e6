"""Every recipe in `jobs/configs` parses; its toy is small, of the same kind, and takes a step without network."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dermray import models
from dermray.config import parse
from dermray.ingest import augment
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.views import Item
from dermray.train import toy
from dermray.train.objectives import kinds
from dermray.train.objectives.contract import Objective, module_of
from dermray.train.objectives.contrastive.module import Contrastive
from dermray.train.optimiser import build_optimiser
from dermray.train.settings import PretrainConfig
from tests.conftest import ROOT
from tests.corpora import RGB, jpeg

RECIPES = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
# Those that look at images.
OF_IMAGES = [path for path in RECIPES if path.stem != "knowledge_pubmed256"]
CPU = torch.device("cpu")


def parsed(recipe: Path, *overrides: str) -> PretrainConfig:
    return parse(PretrainConfig, ["--config", str(recipe), "corpus=c", "output=o", *overrides])


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_published_figures() -> None:
    vit = parsed(ROOT / "jobs/configs/dermlip_vit_b16.yaml")
    panderm = parsed(ROOT / "jobs/configs/dermlip_panderm_pubmed256.yaml")
    assert (vit.train.global_batch_size, panderm.train.global_batch_size) == (4096, 2048)
    for config in (vit, panderm):
        assert (config.train.epochs, config.optim.lr, config.optim.weight_decay) == (30, 1e-4, 0.1)
        assert config.optim.warmup_steps == 1000
        assert config.data.crop_scale == (0.4, 1.0)
        assert config.data.color_jitter == (0.32, 0.32, 0.32, 0.08)
        assert (config.data.color_jitter_prob, config.data.grayscale_prob) == (0.8, 0.2)
        assert config.data.horizontal_flip == 0
    assert (vit.optim.beta2, vit.optim.eps) == (0.98, 1e-6)
    assert (panderm.optim.beta2, panderm.optim.eps) == (0.999, 1e-8)
    vit_cfg, panderm_cfg = models.architecture(vit.model), models.architecture(panderm.model)
    assert vit_cfg["text_cfg"]["context_length"] == 77
    assert vit_cfg["quick_gelu"]
    assert panderm_cfg["text_cfg"]["context_length"] == 256


def test_the_published_figures_of_make() -> None:
    config = parsed(ROOT / "jobs/configs/make_vit_b16.yaml")
    assert (config.train.epochs, config.train.global_batch_size, config.optim.warmup_steps) == (15, 2048, 1500)
    assert (config.optim.lr, config.optim.weight_decay, config.data.crop_scale) == (1e-4, 0.1, (0.4, 1.0))
    assert config.data.color_jitter == (0.32, 0.32, 0.32, 0.08)
    assert (config.data.color_jitter_prob, config.data.grayscale_prob) == (0.8, 0.2)
    published = {"kind": "make", "lambda_m": 1.0, "lambda_s": 0.7, "sigma": 0.0, "weights": True, "sub_captions": 8}
    assert published.items() <= config.objective.model_dump().items()
    assert config.objective.model_dump()["mode"] == "intended"
    graded = parsed(ROOT / "jobs/configs/o_make_vit_b16.yaml")
    published |= {"soft_targets": True, "temperature": 0.07, "beta": 0.5, "divergence": "cross_entropy"}
    assert published.items() <= graded.objective.model_dump().items()
    assert graded.model_dump(exclude={"objective"}) == config.model_dump(exclude={"objective"})


def test_the_published_figures_of_dermfm_open() -> None:
    config = parsed(ROOT / "jobs/configs/dermfm_open_panderm_l.yaml")
    assert (config.train.epochs, config.train.global_batch_size, config.train.grad_clip_norm) == (15, 2048, 5.0)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (1e-4, 0.1, 200)
    assert (config.optim.beta1, config.optim.beta2, config.optim.schedule) == (0.9, 0.98, "cosine")
    make = parsed(ROOT / "jobs/configs/make_vit_b16.yaml")
    assert config.data == make.data
    published = {"lambda_m": 1.0, "lambda_s": 0.5, "lambda_k": 0.4, "weights": False, "sub_captions": 2}
    assert published.items() <= config.objective.model_dump().items()
    model_cfg = models.architecture(config.model)
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    assert (vision_cfg["layers"], vision_cfg["width"], vision_cfg["patch_size"]) == (24, 1024, 16)
    assert model_cfg["embed_dim"] == text_cfg["hf_config"]["hidden_size"] == 768, "there is no projection of texts"
    assert (text_cfg["context_length"], text_cfg["hf_proj_type"]) == (256, None)
    knowledge = models.architecture(parsed(ROOT / "jobs/configs/knowledge_pubmed256.yaml").model)
    assert (knowledge["embed_dim"], knowledge["text_cfg"]) == (768, text_cfg)


def test_the_published_figures_of_panderm() -> None:
    large, base, further = (
        parsed(ROOT / f"jobs/configs/panderm_{name}.yaml") for name in ("large", "base", "continue")
    )
    assert (large.model, large.train.global_batch_size) == ("panderm_large", 1920)
    assert (base.model, base.train.global_batch_size) == ("panderm_base", 2048)
    for config in (large, base):
        assert (config.train.epochs, config.optim.lr, config.optim.weight_decay) == (500, 1.5e-3, 0.05)
        assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.999, 1e-8)
        assert (config.train.grad_clip_norm, config.data.crop_scale, config.data.horizontal_flip) == (3, (0.08, 1), 0.5)
        assert config.data.color_jitter is None
        published = {"mask": "block", "mask_ratio": 0.5, "warmup_epochs": 20, "min_lr": 1e-5, "drop_path": 0.1}
        assert published.items() <= config.objective.model_dump().items()
    assert further.objective.model_dump()["teacher"] == "ema"
    assert further.optim.lr < large.optim.lr / 10


def test_a_recipe_opens_with_its_commands(recipe: Path) -> None:
    comment = recipe.read_text().partition("\nmodel:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"python jobs/pretrain.py --config jobs/configs/{recipe.name}" in comment
    assert "Expect" in comment
    if recipe.stem != "demo":
        assert all(mark in comment for mark in ("laptop", "1 GPU", "8 GPUs", "8x8 GPUs", "toy=true", "num_workers=64"))


def test_the_toy_replaces_what_it_says_and_nothing_else(recipe: Path) -> None:
    config = parsed(recipe, "toy=true", "num_workers=2", "seed=5")
    small = toy.shrunk(config)
    assert PretrainConfig.model_validate(small.model_dump()) == small
    assert toy.shrunk(small) == small
    assert (small.pretrained, small.pretrained_image, small.pretrained_text) == (None, None, None)
    assert (small.train.global_batch_size, small.train.max_steps, small.optim.warmup_steps) == (32, 40, 4)
    assert small.num_steps(steps_per_epoch=7) == min(40, int(config.train.epochs * 7))
    replaced = {"toy", "model", "pretrained", "pretrained_image", "pretrained_text", "train", "optim", "validation"}
    replaced |= {"objective"} if kinds.find(config.objective.kind).toy is not None else set()
    assert small.model_dump(exclude=replaced) == config.model_dump(exclude=replaced)
    kept = {"warmup_steps"}
    assert small.optim.model_dump(exclude=kept) == config.optim.model_dump(exclude=kept)
    cadences = {"global_batch_size", "max_steps", "log_every_steps", "checkpoint_every_steps"}
    assert small.train.model_dump(exclude=cadences) == config.train.model_dump(exclude=cadences)
    assert (small.validation.every_steps is None) == (config.validation.every_steps is None)


def test_without_toy_a_recipe_stays_as_it_is(recipe: Path) -> None:
    config = parsed(recipe)
    assert toy.shrunk(config) is config


def test_the_toy_has_the_same_kind_of_towers() -> None:
    assert toy.tiny_model("ViT-B-16-quickgelu") == "dermray_tiny"
    assert toy.tiny_model("panderm_base_pubmed256") == "panderm_tiny_bert"
    assert toy.tiny_model("roberta-ViT-B-32") == "panderm_tiny_bert"


def test_the_toy_of_masked_latents_keeps_what_no_size_hangs_on() -> None:
    config = parsed(ROOT / "jobs/configs/panderm_large.yaml", "toy=true", "objective.mask=random")
    small = toy.shrunk(config)
    sizes = {"image_size", "patch_size", "regressor_layers", "teacher_layers", "warmup_epochs"}
    whose = {"teacher", "teacher_pretrained"}
    kept = config.objective.model_dump(exclude=sizes | whose)
    assert small.objective.model_dump(exclude=sizes | whose) == kept
    assert small.model_dump()["objective"]["teacher"] == "ema"


def contrastive_step(config: PretrainConfig) -> tuple[nn.Module, Objective, dict[str, torch.Tensor]]:
    """The model, what trains it, and eight images with texts."""
    model, _, tokenizer = models.create(config.model)
    preprocessing = models.preprocessing(model)
    color = ColorAugmentation(config.data, config.seed)
    side = preprocessing.size
    arrays = {
        "pixels": torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)),
        "tokens": tokenizer([f"a photo of condition {number}, with scale" for number in range(8)]),
    }
    return model.train(), Contrastive(preprocessing.mean, preprocessing.std, CPU, color), arrays


def masked_step(config: PretrainConfig) -> tuple[nn.Module, Objective, dict[str, torch.Tensor]]:
    """The same for images alone, as the views make them of pictures."""
    built = module_of(config.objective.kind).build(config, CPU)
    rows: list[Any] = [{"image": jpeg(RGB["brown"], width=80, height=80, seed=number)} for number in range(8)]
    items = [Item((row,), augment.generator(0, 0, number)) for number, row in enumerate(rows)]
    arrays = {name: spec.empty(8) for name, spec in built.views.specs(0).items()}
    built.views.make(items, arrays)
    return built.model, built.objective, {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("recipe", OF_IMAGES, ids=lambda path: path.stem)
def test_the_toys_model_takes_a_step(recipe: Path) -> None:
    config = toy.shrunk(parsed(recipe, "toy=true"))
    torch.manual_seed(0)
    model, task, arrays = (masked_step if config.objective.kind == "masked_latent" else contrastive_step)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 8e6
    optimiser = build_optimiser(model, config.optim)
    batch = Batch(step=0, epoch=0, draws=np.arange(8), arrays=arrays)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = []
    for _ in range(4):
        losses.append(task.backward(model, batch, CPU, nullcontext).loss.item())
        without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert not without, "a parameter without gradient would stop DistributedDataParallel"
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (not value.requires_grad), name
