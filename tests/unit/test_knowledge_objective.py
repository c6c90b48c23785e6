"""Knowledge of diseases: texts about nodes, a text tower that learns them, and a model that is drawn towards it."""

from __future__ import annotations

import functools
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dermray import models
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import CheckpointError, ConfigError, CorpusError, ModelError
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Batch
from dermray.ingest.views import Item
from dermray.losses import ClipLoss
from dermray.train import checkpoint, epochs, pretrain
from dermray.train.objectives import contract
from dermray.train.objectives.knowledge import OBJECTIVE
from dermray.train.objectives.knowledge.nodes import drawn, going_round, said_of
from dermray.train.objectives.knowledge.views import NodeTexts
from dermray.train.objectives.make.module import IMAGE_AREA, Make
from dermray.train.objectives.make.sizes import Sizes, sizes_of
from dermray.train.objectives.make.views import ImageAndTexts
from dermray.train.optimiser import build_optimiser
from dermray.train.settings import PretrainConfig
from tests.corpora import ONTOLOGY, sample, write_model, write_prepared_corpus

CPU = torch.device("cpu")
TOY = "panderm_tiny_bert"
KEYS = ("output=o", "train.global_batch_size=8", "tracking.enabled=false")


@pytest.mark.parametrize(
    ("epoch", "wanted"), [(0, [1, 1, 0, 0, 1]), (1, [1, 0, 1, 0, 1]), (2, [0, 1, 1, 0, 1]), (3, [1, 1, 0, 0, 1])]
)
def test_a_nodes_samples_take_turns(epoch: int, wanted: list[int]) -> None:
    assert going_round(np.array([4, 4, 4, -1, 7]), 2)(epoch).tolist() == wanted


def test_what_the_tree_says_of_a_node() -> None:
    tree = Ontology.from_json(ONTOLOGY)
    assert said_of(tree, "eczema, dermatitis") == ["eczema", "dermatitis", "eczema is a kind of inflammatory"]
    assert said_of(tree, "neoplastic") == ["neoplastic"]


def test_texts_are_drawn_each_once_before_any_comes_again() -> None:
    texts = drawn(["a", "b", "c"], 7, np.random.default_rng(0))
    assert sorted(texts[:3]) == sorted(texts[3:6]) == ["a", "b", "c"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knowledge") / "corpus"
    write_prepared_corpus(folder, {"train": 24})
    return folder


def configured(corpus: Path, *keys: str) -> PretrainConfig:
    return parse(PretrainConfig, [f"corpus={corpus}", f"model={TOY}", *KEYS, *keys])


def test_every_node_is_drawn_equally_often(corpus: Path) -> None:
    config = configured(corpus, "objective.kind=knowledge", "objective.samples_per_node=2")
    assert OBJECTIVE.counts is not None
    counts = OBJECTIVE.counts(config, Manifest.load(str(corpus)).select("train"))
    assert counts is not None
    first = counts(0).reshape(6, 4)
    # The condition goes round with the sample's number, over four of them.
    assert first.sum(axis=0).tolist() == [2, 2, 2, 2]
    assert (first + counts(1).reshape(6, 4) + counts(2).reshape(6, 4)).tolist() == [[1] * 4] * 6


def items(rows: list[dict[str, Any]]) -> list[Item]:
    whole = [{"duplicate_group": None} | row for row in rows]
    return [Item([row], np.random.default_rng(n)) for n, row in enumerate(whole)]  # type: ignore[list-item]


def batch_of(views: Any, rows: list[dict[str, Any]], step: int = 0) -> Batch:
    out = {name: spec.empty(len(rows)) for name, spec in views.specs(step).items()}
    views.make(items(rows), out)
    return Batch(step, 0, np.arange(len(rows)), {name: torch.from_numpy(value) for name, value in out.items()})


def rows(num: int = 8) -> list[dict[str, Any]]:
    return [sample(index, "train", raw=index != 2) for index in range(num)]


def test_a_sample_gives_texts_about_its_node_and_what_it_shows(corpus: Path) -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.zeros((len(texts), 5), dtype=np.int32)

    views = NodeTexts(encode, 4, {"psoriasis": 0}, [["psoriasis", "psoriasis is a kind of inflammatory"]])
    shows = sample(1, "train") | {
        "captions": [{"aspect": "concept", "text": "Scales."}, {"aspect": "raw", "text": "A."}]
    }
    batch = batch_of(views, [sample(1, "train"), shows])
    assert batch["node"].tolist() == [0, 0]
    names = {"psoriasis", "psoriasis is a kind of inflammatory"}
    assert set(seen[1:5]) == names | {"pink"}
    assert set(seen[5:]) == names | {"Scales."}
    with pytest.raises(CorpusError, match="has no label of the disease tree"):
        batch_of(views, [sample(0, "train")])


def stepped(corpus: Path, *keys: str) -> tuple[contract.Built, list[float], dict[str, torch.Tensor]]:
    """The objective after five steps on one batch, their losses, and the gradients of the first."""
    config = configured(corpus, "objective.kind=knowledge", "optim.lr=1e-3", *keys)
    torch.manual_seed(0)
    built = contract.module_of("knowledge").build(config, CPU)
    batch = batch_of(built.views, rows())
    optimiser = build_optimiser(built.model, config.optim, built.groups)
    losses, gradients = [], {}
    for step in range(5):
        torch.manual_seed(1)
        losses.append(float(built.objective.backward(built.model, batch, CPU, nullcontext).loss))
        if step == 0:
            gradients = {
                name: each.grad.clone() for name, each in built.model.named_parameters() if each.grad is not None
            }
        optimiser.step()
        optimiser.zero_grad()
    return built, losses, gradients


def test_the_text_tower_learns_and_nothing_else_changes(corpus: Path) -> None:
    built, losses, gradients = stepped(corpus)
    assert losses[-1] < losses[0]
    trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert set(gradients) == trained == {name for name, _ in built.model.named_parameters() if name.startswith("text.")}


def test_micro_batches_of_texts_give_the_gradient_of_the_batch(corpus: Path) -> None:
    # BERT draws other numbers for other micro-batches.
    still = models.create(TOY)[0]
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in still.modules())
    config = [configured(corpus, "objective.kind=knowledge", *keys) for keys in ((), ("train.micro_batch_size=3",))]
    found = []
    for each in config:
        torch.manual_seed(0)
        built = contract.module_of("knowledge").build(each, CPU)
        batch = batch_of(built.views, rows())
        loss = built.objective.backward(built.model.eval(), batch, CPU, nullcontext).loss
        found.append((loss, {name: p.grad for name, p in built.model.named_parameters() if p.grad is not None}))
    (one, whole), (other, parts) = found
    torch.testing.assert_close(one, other)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=2e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def knowledge(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run of the objective leaves it."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    built, _, _ = stepped(corpus)
    built.export(built.model, str(folder), {})
    return folder


def test_a_model_begins_with_the_text_tower_of_a_folder_and_its_projection(knowledge: Path) -> None:
    model, _, _ = models.create(TOY, pretrained_text=str(knowledge))
    wanted, _, _ = models.create(str(knowledge))
    for name, value in wanted.get_submodule("text").state_dict().items():
        assert torch.equal(model.get_submodule("text").state_dict()[name], value), name


def made(corpus: Path, *keys: str) -> tuple[contract.Built, ImageAndTexts]:
    torch.manual_seed(0)
    config = configured(corpus, "objective.kind=make", "objective.sub_captions=2", *keys)
    built = contract.module_of("make").build(config, CPU)
    assert isinstance(built.views, ImageAndTexts)
    # Dropout of the text tower would differ between what is compared.
    built.model.eval()
    return built, built.views


def test_distillation_adds_clips_loss_between_a_text_and_what_the_frozen_encoder_makes_of_it(
    corpus: Path, knowledge: Path
) -> None:
    plain, views = made(corpus)
    batch = batch_of(views, rows())
    without = plain.objective.backward(plain.model, batch, CPU, nullcontext)
    built, _ = made(corpus, f"objective.knowledge={knowledge}", "objective.lambda_k=0.3")
    outcome = built.objective.backward(built.model, batch, CPU, nullcontext)
    teacher, _, _ = models.create(str(knowledge))
    # Sample 2 has no raw caption: its first text is the ontology's.
    first = batch["tokens"][torch.arange(8), torch.tensor([0, 0, 1, 0, 0, 0, 0, 0])].long()
    own, known = (each.encode_text(first, normalize=True) for each in (built.model, teacher))
    wanted = ClipLoss("dense")(own, known, built.model.logit_scale.exp())
    torch.testing.assert_close(outcome.figures["knowledge"].value, wanted.detach())
    torch.testing.assert_close(outcome.loss, without.loss + 0.3 * wanted.detach())
    assert all(name.startswith(("visual.", "text.", "logit_scale")) for name, _ in built.model.named_parameters())
    parted, _ = made(corpus, f"objective.knowledge={knowledge}", "objective.lambda_k=0.3", "train.micro_batch_size=3")
    again = parted.objective.backward(parted.model, batch, CPU, nullcontext)
    torch.testing.assert_close(again.loss, outcome.loss)
    for (name, one), (_, other) in zip(built.model.named_parameters(), parted.model.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=5e-5, rtol=1e-3, msg=name)


def test_an_encoder_that_does_not_fit_is_refused_before_workers_start(
    corpus: Path, knowledge: Path, tmp_path: Path
) -> None:
    pretrain.check(configured(corpus, "objective.kind=make", f"objective.knowledge={knowledge}"))
    other = write_model(tmp_path / "other")
    with pytest.raises(ModelError, match="gives vectors of 32 numbers, and the model 'panderm_tiny_bert' of 128"):
        pretrain.check(configured(corpus, "objective.kind=make", f"objective.knowledge={other}"))
    tiny = tmp_path / "tiny"
    model, _, _ = models.create("dermray_tiny")
    models.save(model, str(tiny), model_cfg=models.architecture("dermray_tiny"), provenance={})
    with pytest.raises(ModelError, match="reads texts by another tokeniser, or of another length"):
        pretrain.check(configured(corpus, "objective.kind=make", f"objective.knowledge={tiny}"))
    with pytest.raises(ConfigError, match="lambda_k means something with knowledge alone"):
        configured(corpus, "objective.kind=make", "objective.lambda_k=0.1")
    with pytest.raises(ConfigError, match="has no validation"):
        pretrain.check(
            configured(corpus, "objective.kind=knowledge", "validation.every_steps=5", "validation.split=train")
        )


def test_a_run_whose_encoder_was_replaced_does_not_go_on(corpus: Path, tmp_path: Path) -> None:
    encoder, output = tmp_path / "encoder", tmp_path / "out"

    def teach(seed: int) -> None:
        torch.manual_seed(seed)
        model, _, _ = models.create(TOY)
        models.save(model, str(encoder), model_cfg=models.architecture(TOY), provenance={})

    teach(0)
    keys = ("objective.kind=make", f"objective.knowledge={encoder}")
    config = configured(corpus, *keys).model_copy(update={"output": str(output)})
    corpora = Corpora.load(config.corpus_uris)

    def saved(trajectory: dict[str, Any]) -> None:
        kept = checkpoint.Retention(1)
        checkpoint.save(
            str(output), 1, {"step": 1}, trajectory=trajectory, corpus_digest=corpora.digest, retention=kept
        )

    saved(epochs.trajectory(pretrain.located(config), corpora))
    pretrain.check(config)
    teach(1)
    with pytest.raises(CheckpointError, match="weights of frozen models was .'[0-9a-f]{64}'., now .'[0-9a-f]{64}'"):
        pretrain.check(config)
    without = configured(corpus, "objective.kind=make")
    assert checkpoint.FROZEN not in epochs.trajectory(without, corpora)
    # Of a folder that is gone nothing is known; a finished run still tells its result.
    shutil.rmtree(encoder)
    assert checkpoint.FROZEN not in epochs.trajectory(config, corpora)


def test_the_size_of_a_batch_is_a_function_of_the_step() -> None:
    sizes = Sizes(usual=64, largest=128, patch=8, share=0.5, seed=3)
    sides = [sizes.at(step) for step in range(4000)]
    assert sides == [sizes.at(step) for step in range(4000)]
    assert set(sides) == set(range(64, 129, 8))
    # Half of another size, half of these the largest; of what is drawn between, a ninth is the usual one.
    assert np.mean(np.array(sides) == 128) == pytest.approx(0.25 + 0.25 / 9, abs=0.03)
    assert np.mean(np.array(sides) == 64) == pytest.approx(0.5 + 0.25 / 9, abs=0.03)
    assert sides != [Sizes(64, 128, 8, 0.5, seed=4).at(step) for step in range(4000)]


def test_a_step_takes_images_of_its_size(corpus: Path) -> None:
    built, views = made(corpus, "objective.scale_jitter=1")
    assert views.sizes is not None
    large = next(step for step in range(99) if views.sizes.at(step) == 128)
    for step in (large, next(step for step in range(99) if views.sizes.at(step) < 128)):
        side = views.sizes.at(step)
        batch = batch_of(views, rows(4), step)
        assert batch["pixels"].shape == (4, side, side, 3)
        outcome = built.objective.backward(built.model, batch, CPU, nullcontext)
        assert outcome.loss.isfinite()
        assert outcome.figures[IMAGE_AREA].value == (side / 64) ** 2
    assert isinstance(built.objective, Make)
    flops = [built.objective.flops({"text_tokens": 0.0, IMAGE_AREA: area}) for area in (1.0, 4.0)]
    assert flops[1] == pytest.approx(4 * (flops[0] or 0))


def test_the_table_of_panderm_is_resized_and_its_own_grid_is_not_touched() -> None:
    visual = models.create(TOY)[0].get_submodule("visual")
    own = functools.partial(visual.positions)  # type: ignore[operator]
    assert own(8, 8) is visual.pos_embed
    resized = own(16, 12)
    assert resized.shape == (1, 1 + 16 * 12, 128)
    assert torch.equal(resized[:, :1], visual.pos_embed[:, :1])  # type: ignore[index]
    grid = visual.pos_embed[0, 1:].view(8, 8, 128)  # type: ignore[index, operator]
    # Row 3 of 16 lies a quarter of the way from row 1 to row 2 of 8, column 0 of 8 at its own place.
    wanted = 0.75 * grid[1, 0] + 0.25 * grid[2, 0]
    torch.testing.assert_close(own(16, 8)[0, 1 + 3 * 8], wanted)


@pytest.mark.parametrize(
    ("model", "jitter", "message"),
    [
        ("dermray_tiny", "1.5", "'dermray_tiny': its vision tower takes images of one size"),
        (TOY, "1.1", "gives no side above the 64 pixels"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused(corpus: Path, model: str, jitter: str, message: str) -> None:
    keys = ("objective.kind=make", "objective.scale_jitter=0.5", f"objective.scale_jitter_max={jitter}")
    config = configured(corpus, *keys)
    with pytest.raises(ModelError, match=message):
        sizes_of(config.objective, models.architecture(model), model, 0)  # type: ignore[arg-type]
