"""Masked latent alignment as an objective: views, teachers, groups, rates, checkpoints, exchange, several ranks."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dermray import models
from dermray.config import parse
from dermray.errors import ConfigError, ModelError
from dermray.ingest import augment
from dermray.ingest.loader import Batch
from dermray.ingest.views import Item
from dermray.train import checkpoint, loop
from dermray.train.objectives.masked_latent import module, teachers, validation
from dermray.train.objectives.masked_latent.settings import MaskedLatentConfig
from dermray.train.optimiser import build_optimiser
from dermray.train.settings import PretrainConfig
from dermray.vectors.encoder import Encoder
from tests.corpora import RGB, jpeg, write_model, write_prepared_corpus
from tests.process_groups import run_ranks

CPU = torch.device("cpu")
SMALL = ("objective.image_size=32", "objective.patch_size=8", "objective.regressor_layers=2", "model=panderm_toy")
NUM_STEPS = 6


def configured(*overrides: str) -> PretrainConfig:
    train = ["train.global_batch_size=8", "optim.lr=1e-3", "optim.warmup_steps=0", "optim.eps=1e-4", "seed=5"]
    keys = ["corpus=c", "output=o", "objective.kind=masked_latent", "data.horizontal_flip=0.5"]
    return parse(PretrainConfig, [*keys, *SMALL, *train, *overrides])


def made(config: PretrainConfig, step: int) -> Batch:
    """A global batch as the loader makes it."""
    settings = config.objective
    assert isinstance(settings, MaskedLatentConfig)
    views = module.build(config, CPU).views
    rows = [{"image": jpeg(RGB["brown"], width=60, height=50, seed=8 * step + place)} for place in range(8)]
    items = [Item((row,), augment.generator(config.seed, step, place)) for place, row in enumerate(rows)]  # type: ignore[arg-type]
    arrays = {name: spec.empty(8) for name, spec in views.specs(step).items()}
    views.make(items, arrays)
    return Batch(step, step, np.arange(8), {name: torch.from_numpy(array) for name, array in arrays.items()})


def trainer_of(config: PretrainConfig, world_size: int = 1) -> loop.Trainer:
    built = module.build(config, CPU)
    return loop.Trainer(
        config=config,
        objective=built.objective,
        model=built.model,
        wrapped=DistributedDataParallel(built.model) if world_size > 1 else built.model,
        optimiser=build_optimiser(built.model, config.optim, built.groups),
        device=CPU,
        num_steps=NUM_STEPS,
        schedule=built.schedule,
    )


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    return replace(batch, draws=batch.draws[rows], arrays={name: each[rows] for name, each in batch.arrays.items()})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teachers") / "clip")


def two_steps(rank: int, world_size: int) -> dict[str, Any]:
    """Weights, average and centre after two steps on the same global batches, alone by micro-batches."""
    warnings.simplefilter("ignore")
    config = configured("data.color_jitter=[0.2, 0.2, 0.2, 0.05]", "objective.drop_path=0.3")
    if world_size == 2:
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 3})})
    trainer = trainer_of(config, world_size)
    for step in range(2):
        trainer.train_step(part_of(made(config, step), rank, world_size))
    state = trainer.objective.state()
    average = {f"average.{name}": value for name, value in state["average"].items()}
    return {
        **{name: value.detach() for name, value in trainer.model.named_parameters()},
        **average,
        "centre": state["centre"],
    }


def test_workers_together_equal_one_alone(tmp_path: Path) -> None:
    answers = run_ranks(two_steps, (1, 2, 4), tmp_path)
    (alone,) = answers[1]
    start = dict(module.build(configured(), CPU).model.named_parameters())
    assert max(float((alone[name] - value.detach()).abs().max()) for name, value in start.items()) > 1e-3
    assert alone["centre"].abs().max() > 1e-3
    for others in (answers[2], answers[4]):
        for name, value in alone.items():
            for one in others:
                torch.testing.assert_close(one[name], value, atol=1e-5, rtol=0, msg=name)


def test_the_step_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = configured()
    where: dict[str, Any] = {"trajectory": config.trajectory(), "corpus_digest": "c"}

    def trained(trainer: loop.Trainer, until: int) -> loop.Trainer:
        for step in range(trainer.step, until):
            trainer.train_step(made(config, step))
        return trainer

    whole = trained(trainer_of(config), NUM_STEPS)
    first = trained(trainer_of(config), 3)
    checkpoint.save(str(tmp_path), 3, first.state(), retention=checkpoint.Retention(1), **where)
    resumed = trainer_of(config)
    latest = checkpoint.load_latest(str(tmp_path), **where)
    assert latest is not None
    resumed.restore(latest[1])
    trained(resumed, NUM_STEPS)
    for one, other in (
        (whole.model, resumed.model),
        (whole.objective._teacher.visual, resumed.objective._teacher.visual),
    ):  # type: ignore[attr-defined]
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert not torch.equal(whole.model.encoder.cls_token, whole.objective._teacher.visual.cls_token)  # type: ignore[union-attr,attr-defined]
    assert whole.objective.flops({}) > 0  # type: ignore[operator]


def test_one_crop_goes_to_both_at_their_own_size(clip: Path) -> None:
    config = configured(f"objective.teacher={clip}", "data.crop_scale=[0.2, 0.5]")
    built = module.build(config, CPU)
    # 4 patches a side, of 8 pixels each for the teacher too.
    batch = made(config, 0)
    assert batch["pixels"].shape == batch["teacher_pixels"].shape == (8, 32, 32, 3)
    apart = (batch["pixels"].float() - batch["teacher_pixels"].float()).abs()
    assert 0 < apart.mean() < 4, "another filter, the same crop"
    assert batch["mask"].sum(dim=1).tolist() == [8] * 8
    assert built.objective.state() == {}
    outcome = built.objective.backward(built.model, batch, CPU, nullcontext)
    assert {"class_cosine", "visible_cosine", "masked_cosine", "target_spread"} == outcome.figures.keys()
    assert 0 < outcome.loss.item() < 2


def test_a_teachers_grid_is_the_encoders(clip: Path) -> None:
    own = teachers.ClipTeacher(str(clip), None, 4, CPU)
    assert (own.size, own.width) == (32, 32)
    model, _, _ = models.create(str(clip))
    visual: Any = model.visual
    table = visual.positional_embedding.detach().clone()
    teachers.fit_to_grid(visual, 4)
    assert torch.equal(visual.positional_embedding, table)
    other = teachers.ClipTeacher(str(clip), None, 6, CPU)
    assert other.size == 48
    tokens = other(255 * torch.rand(2, 3, 48, 48))
    assert tokens.shape == (2, 37, 32)
    torch.testing.assert_close(tokens.norm(dim=2), torch.ones(2, 37))
    resized = other.visual.positional_embedding
    assert torch.equal(resized[0], table[0])
    # The middle of a smooth enough table stays where it is.
    assert (resized[1:].mean(dim=0) - table[1:].mean(dim=0)).abs().max() < 0.1 * table.std()
    # The class token's latent is what the model makes of the image.
    levels = 255 * torch.rand(2, 3, 32, 32)
    preprocessing = models.preprocessing(model)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        image = torch.nn.functional.normalize(model.encode_image((levels / 255 - mean) / std), dim=1)  # type: ignore[operator]
    torch.testing.assert_close(own(levels)[:, 0], image, atol=1e-5, rtol=1e-4)


def test_groups_are_the_published_ones() -> None:
    model = module.build(configured(), CPU).model
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    tokens = {"encoder.cls_token", "mask_token"}
    for decay, decayed_tokens in (("intended", set()), ("released", tokens)):
        exempt, decayed = ({named[id(p)] for p in group.parameters} for group in module.groups(model, decay))
        assert decayed & tokens == decayed_tokens
        assert {"encoder.blocks.0.attn.q_bias", "encoder.blocks.0.gamma_1", "decoder.head.bias"} <= exempt
        assert {"encoder.patch_embed.proj.weight", "regresser.regressor_blocks.0.cross_attn.k.weight"} <= decayed
        assert not {name for name in exempt | decayed if "pos_embed" in name or "regresser.norm" in name}


def test_the_rate_warms_up_in_epochs_and_ends_above_zero() -> None:
    keys = ("optim.lr=1.5e-3", "train.epochs=500", "objective.warmup_epochs=20")
    config = configured(*keys)
    settings = config.objective
    assert isinstance(settings, MaskedLatentConfig)
    rates = [module.rate(config, settings, step, 5000) for step in range(5000)]
    assert rates[0] == pytest.approx(1.5e-3 / 200)
    assert (max(rates), rates.index(max(rates))) == (pytest.approx(1.5e-3), 199)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-2)
    assert min(rates[200:]) >= 1e-5
    assert module.rate(
        configured("optim.warmup_steps=4"), settings.model_copy(update={"warmup_epochs": None}), 0, 10
    ) == pytest.approx(2.5e-4)


def test_what_it_exports_is_read_as_an_encoder_a_start_and_a_tower_of_dermlip(tmp_path: Path) -> None:
    toy = ("objective.image_size=64", "model=panderm_toy", "objective.regressor_layers=1")
    built = module.build(configured(*toy), CPU)
    folder = tmp_path / "model"
    digest = built.export(built.model, str(folder), {"code_version": "0"})
    encoder = Encoder.load(str(folder), device="cpu")
    assert (encoder.info.model_digest, encoder.info.embedding_dim, encoder.info.image_size) == (digest, 128, 64)
    pixels = encoder.preprocess(jpeg(RGB["red"], width=90))
    state = built.model.state_dict()
    with torch.no_grad():
        expected = built.model.encoder(torch.from_numpy(pixels)[None])[:, 0]  # type: ignore[operator]
    np.testing.assert_allclose(encoder.encode_pixels(pixels[None], normalise=False), expected.numpy(), atol=1e-5)
    assert models.described(str(folder))["library"] == "panderm"

    dermlip, _, _ = models.create("panderm_tiny_bert", pretrained_image=str(folder))
    for name, value in dermlip.visual.state_dict().items():  # type: ignore[union-attr]
        assert name.startswith("head.") or torch.equal(value, state[f"encoder.{name}"]), name
    # A start of its own kind: all of it, or of another size what does not hang on it.
    again = module.build(configured(*toy, f"pretrained_image={folder}", "seed=6"), CPU).model
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    larger = module.build(configured(*toy[1:], "objective.image_size=96", f"pretrained_image={folder}"), CPU).model
    assert larger.rd_pos_embed.shape == (1, 145, 128)
    assert torch.equal(larger.encoder.norm.weight, state["encoder.norm.weight"])  # type: ignore[union-attr]
    # The encoder alone, as PanDerm names it.
    alone = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    safetensors.torch.save_file(alone, tmp_path / "tower.safetensors")
    from_tower = module.build(configured(*toy, f"pretrained_image={tmp_path / 'tower.safetensors'}"), CPU).model
    assert torch.equal(from_tower.encoder.cls_token, state["encoder.cls_token"])  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="do not fit the architecture"):
        module.build(configured("model=panderm_tiny", f"pretrained_image={folder}"), CPU)


def test_features_are_scored_and_a_collapse_is_said_in_words() -> None:
    random = np.random.default_rng(0)
    labels = np.array([0, 1, 2] * 20 + [-1, 3])
    # As wide as an encoder: the probe's penalty falls with the width, and is all that counts for a few numbers.
    centres = random.normal(size=(4, 128))
    features = (centres[labels] + 0.1 * random.normal(size=(62, 128))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    scores = validation.of_features(features, labels)
    assert scores["knn_accuracy"] == scores["linear_probe_accuracy"] == 1
    assert 1.5 < scores["effective_rank"] < 62
    assert 0.1 < scores["spread"] < 1
    unlabelled = validation.of_features(features, np.full(62, -1))
    assert unlabelled.keys() == {"effective_rank", "spread"}
    objective = module.build(configured(), CPU).objective
    assert objective.verdict({f"validation_{name}": value for name, value in scores.items()}) == ""
    one = np.repeat(features[:1], 62, axis=0) + np.float32(1e-4) * random.normal(size=(62, 128)).astype(np.float32)
    collapsed = validation.of_features(one, labels)
    assert "the features have collapsed" in objective.verdict({f"validation_{k}": v for k, v in collapsed.items()})
    assert [each.tolist() for each in validation.halves(np.array([0, 1, 0, -1, 0]))] == [[0, 4], [2]]


def test_validation_scores_held_out_images_by_what_they_are(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 16, "val": 32})
    config = configured(f"corpus={tmp_path / 'corpus'}", "validation.every_steps=2", "validation.max_samples=24")
    built = module.build(config, CPU)
    assert built.validate is not None
    scores = built.validate(built.model)
    assert scores.keys() == {
        *("validation_knn_accuracy", "validation_linear_probe_accuracy", "validation_effective_rank"),
        *("validation_spread", "validation_masked_cosine"),
    }
    assert built.model.training
    assert built.validate(built.model) == scores
    assert set(validation.by_modality(np.array([1.0, 0.5, 0.0]), ["clinical", "total-body", None])) == {
        *("masked_cosine_clinical", "masked_cosine_total_body"),
    }


REFUSED = {
    "objective.patch_size=5": "must be a multiple of patch_size=5",
    "objective.mask_count=16": "16 of 16 patches would be masked",
    "objective.teacher_pretrained=openai": "is for a teacher that is named",
    "objective.visible_weight=0 objective.masked_weight=0": "nothing would be learned",
    "model=ViT-B-16": "names none: give one of panderm_toy, panderm_tiny",
    "pretrained=openai": "give its weights as pretrained_image",
    "loss.name=siglip": "leave out loss",
    "train.channels_last=true": "train.channels_last",
    "pretrained_image=nowhere.pth": "does not exist",
    "objective.teacher=RN50": "gives no features of patches",
    "objective.teacher=ViT-B-161": "unknown model 'ViT-B-161'",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_means_nothing_is_refused(overrides: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=REFUSED[overrides]):
        module.check(configured(*overrides.split()))


def test_what_is_made_of_a_sample_hangs_on_nothing_but_its_draw() -> None:
    config = configured("objective.drop_path=0.2")
    one, other = made(config, 0), made(config, 0)
    assert {"pixels", "mask", "kept"} == one.arrays.keys()
    for name in one.arrays:
        assert torch.equal(one[name], other[name])
        assert not torch.equal(one[name], made(config, 1)[name])
    kept: Tensor = one["kept"]
    assert set(kept[:, :2].unique().tolist()) == {1.0}
    assert set(np.round(kept[:, 6:8].unique().tolist(), 4)) <= {0.0, 1.25}
