"""Soft targets in a run of the objective `contrastive`: what is read, what is computed, what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.errors import ConfigError, CorpusError
from dermray.ingest.loader import Batch
from dermray.ingest.views import Item
from dermray.losses import ClipLoss, Graded
from dermray.train import pretrain
from dermray.train.objectives import contract
from dermray.train.objectives.contrastive.diagnoses import tree_of
from dermray.train.settings import PretrainConfig
from tests.corpora import sample, write_model, write_prepared_corpus

CPU = torch.device("cpu")
SOFT = "loss.soft_targets=true"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("graded")
    write_prepared_corpus(folder / "corpus", {"train": 16})
    return (
        f"corpus={folder / 'corpus'}",
        f"model={write_model(folder / 'model')}",
        "output=o",
        "train.global_batch_size=8",
    )


def batch_of(built: contract.Built, samples: np.ndarray | None = None, epoch: int = 0) -> Batch:
    rows = [sample(index, "train", labelled=index != 5) | {"duplicate_group": None} for index in range(6)]
    out = {name: spec.empty(6) for name, spec in built.views.specs(0).items()}
    items = [Item([row], np.random.default_rng(index)) for index, row in enumerate(rows)]  # type: ignore[list-item]
    built.views.make(items, out)
    return Batch(0, epoch, np.arange(6), {name: torch.from_numpy(value) for name, value in out.items()}, samples)


def step(places: tuple[str, ...], *keys: str, samples: np.ndarray | None = None) -> tuple[contract.Built, float]:
    built = contract.module_of("contrastive").build(parse(PretrainConfig, [*places, *keys]), CPU)
    return built, float(built.objective.backward(built.model, batch_of(built, samples), CPU, nullcontext).loss)


def test_labels_are_read_only_where_they_count(places: tuple[str, ...]) -> None:
    hard, soft = (step(places, *keys)[0].views for keys in ((), (SOFT,)))
    assert (hard.columns, soft.columns) == (("image", "captions"), ("image", "captions", "labels"))
    assert "diagnosis" not in hard.specs(0)


def test_a_step_is_the_loss_of_what_the_towers_give(places: tuple[str, ...]) -> None:
    built, loss = step(places, SOFT, "loss.beta=0.8", "loss.temperature=0.3")
    batch, tree = batch_of(built), tree_of(parse(PretrainConfig, list(places)))
    names = list(tree)
    first = [sample(index, "train", labelled=index != 5)["labels"][:1] for index in range(6)]
    assert batch["diagnosis"].tolist() == [names.index(label[0]) if label else -1 for label in first]
    levels = (batch["pixels"].permute(0, 3, 1, 2).float() - built.objective._mean) / built.objective._std
    image, text, scale = built.model(levels, batch["tokens"].long())
    graded = Graded(batch["diagnosis"], torch.from_numpy(tree.similarity(names)), 0.3, 0.8)
    assert loss == pytest.approx(ClipLoss()(image, text, scale, graded=graded).item(), rel=1e-5)
    # Two draws of a sample share the target as all of one diagnosis do.
    twice = np.array([0, 0, 1, 2, 3, 4])
    assert step(places, SOFT, "loss.beta=0.8", "loss.temperature=0.3", samples=twice)[1] == loss


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_every_key_changes_the_loss(places: tuple[str, ...], name: str) -> None:
    variants: list[tuple[str, ...]] = [
        (),
        (SOFT,),
        (SOFT, "loss.beta=0.2"),
        (SOFT, "loss.temperature=0.5"),
        (SOFT, "loss.divergence=kl"),
    ]
    losses = [step(places, f"loss.name={name}", *keys)[1] for keys in variants]
    assert len({round(loss, 6) for loss in losses}) == len(losses)
    small = step(places, f"loss.name={name}", SOFT, "train.micro_batch_size=2")[1]
    assert small == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("kind", "key"), [("contrastive", "loss"), ("make", "objective")])
def test_the_curriculum_is_a_share_that_the_epoch_decides(places: tuple[str, ...], kind: str, key: str) -> None:
    def loss_of(beta: float, curriculum: int | None, epoch: int) -> float:
        keys = [f"objective.kind={kind}", f"{key}.soft_targets=true", f"{key}.beta={beta}"]
        keys += [f"{key}.curriculum_epochs={curriculum}"] if curriculum else []
        built = contract.module_of(kind).build(parse(PretrainConfig, [*places, *keys]), CPU)
        return float(built.objective.backward(built.model, batch_of(built, epoch=epoch), CPU, nullcontext).loss)

    assert loss_of(0.8, 4, 0) == loss_of(0.8, None, 0)
    assert loss_of(0.8, 4, 2) == pytest.approx(loss_of(0.4, None, 2), rel=1e-5)
    assert loss_of(0.8, 4, 5) == pytest.approx(loss_of(0.0, None, 5), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("loss.beta=0.3",), "beta means something with soft_targets=true alone"),
        ((SOFT, "loss.mask_duplicates=true"), "leave mask_duplicates out"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, ["corpus=c", "output=o", *keys])


def test_a_corpus_without_a_tree_is_refused_before_workers_start(places: tuple[str, ...], tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 16})
    (tmp_path / "corpus" / "ontology.json").unlink()
    corpus = str(tmp_path / "corpus")
    Manifest.load(corpus).model_copy(update={"ontology_sha256": None}).save(corpus)
    run = [f"corpus={corpus}", *places[1:]]
    pretrain.check(parse(PretrainConfig, run))
    with pytest.raises(CorpusError, match="ontology"):
        pretrain.check(parse(PretrainConfig, [*run, SOFT]))
