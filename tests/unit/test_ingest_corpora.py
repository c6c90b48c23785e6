"""Several corpora in one run: shares of an epoch, where samples lie, resumes, validation, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray import models
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.corpus.shares import CorpusShare
from dermray.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    EvaluationError,
    ImageError,
    PlanError,
    SplitError,
)
from dermray.evaluate.leakage import Leakage
from dermray.ingest import decoding, draws
from dermray.ingest.corpora import Corpora
from dermray.ingest.plan import EpochPlan
from dermray.ingest.views import Arrays, Item
from dermray.train import checkpoint, epochs, pretrain, trajectory
from dermray.train.objectives.contrastive.validation import Validator
from dermray.train.settings import PretrainConfig, ValidationConfig
from tests import rotation
from tests.corpora import write_model, write_prepared_corpus
from tests.unit.test_plan import manifests


def configured(corpus: str, *keys: str) -> PretrainConfig:
    return parse(PretrainConfig, [f"corpus={corpus}", "output=o", "train.global_batch_size=4", *keys])


def test_one_path_stays_one_path_and_shares_are_read_from_a_line_and_decide_the_weights() -> None:
    assert configured("[a]") == configured("a") == configured("[{uri: a, weight: 3}]")
    several = configured("[{uri: a, weight: 3}, {uri: b, weight: 0.5}]")
    assert several.corpora == (CorpusShare(uri="a", weight=3), CorpusShare(uri="b", weight=0.5))
    assert configured("[a, b]").corpora == (CorpusShare(uri="a"), CorpusShare(uri="b"))
    assert several.trajectory() | {"corpus.0.weight": 3.0, "corpus.1.weight": 0.5} == several.trajectory()
    assert not any(key.startswith("corpus") for key in configured("a").trajectory())
    assert trajectory.undeclared(PretrainConfig) == []
    assert parse(PretrainConfig, [], several.model_dump()) == several


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("[]", "corpus: needs a URI, or several"),
        ("[{uri: a, weight: 2}, b]", "corpus: give every corpus a weight, or none"),
        ("[{uri: /a}, {uri: /a/}]", "corpus: /a stands there twice; give it a greater weight instead"),
        ("[{uri: a}, {uri: b, weight: .inf}]", "corpus: entry 2 of 2: weight: Input should be a finite number"),
        ("[{uri: a}, {uri: b, weight: 0}]", "corpus: entry 2 of 2: weight: Input should be greater than 0"),
        ("[{uri: a}, {url: b}]", "corpus: entry 2 of 2: uri: Field required"),
        ("[{uri: a}, {uri: b, wieght: 1}]", "corpus: entry 2 of 2: wieght: Extra inputs are not permitted"),
    ],
)
def test_what_no_corpora_are_is_refused(corpus: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(corpus)


def test_a_corpus_of_which_the_first_epoch_draws_nothing_has_no_draws_in_the_others() -> None:
    weights = np.array([0, 1, 2])
    none = epochs.CorpusDraws("c", np.array([3]), lambda epoch: np.roll(weights, epoch), np.array([1, 0, 0]), 0)
    assert [none.counts(epoch, 0).sum() for epoch in range(3)] == [0, 0, 0]
    with pytest.raises(PlanError, match="the objective uses none of the samples of a, b"):
        epochs._weighted(0, [1, 2], ["a", "b"])


@given(st.integers(0, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_add_up_and_are_exact_to_one(total: int, weights: list[float]) -> None:
    parts = draws.apportioned(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-9


@given(st.lists(manifests, min_size=2, max_size=3), st.data())
@settings(max_examples=60)
def test_every_epoch_has_the_share_of_each_corpus_in_any_world(found: list[Manifest], data: st.DataObject) -> None:
    """And over epochs the samples of a corpus are drawn equally often, but for one time."""
    weights = [data.draw(st.sampled_from((0.5, 1, 2, 3))) for _ in found]
    named = ", ".join(f"{{uri: c{place}, weight: {weight}}}" for place, weight in enumerate(weights))
    config = configured(f"[{named}]", f"seed={data.draw(st.integers(0, 3))}")
    corpora = Corpora(config.corpus_uris, tuple(found))
    total = sum(manifest.num_samples for manifest in found)
    lengths = draws.apportioned(total, weights)
    if total < 4 or not all(lengths):
        with pytest.raises(PlanError, match="fewer than one global batch|is less than one of an epoch's"):
            epochs.first(config, corpora)
        return
    counts = epochs.counts(config, corpora.select("train"))
    assert counts is not None
    borders = np.cumsum([0, *(manifest.num_samples for manifest in found)])
    drawn = np.zeros(total, dtype=np.int64)
    for epoch in range(5):
        drawn += counts(epoch)
        assert np.add.reduceat(counts(epoch), borders[:-1]).tolist() == lengths
        for begin, end in itertools.pairwise(borders):
            assert np.ptp(drawn[begin:end]) <= 1
    plan = EpochPlan(corpora, seed=config.seed, epoch=4, global_batch_size=4, counts=counts(4))
    for world_size in plan.world_sizes:
        parts = [plan.rank_batch(0, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), plan.batch(0))


class Damaged(rotation.TurnedImage):
    """Finds every image damaged."""

    def __init__(self) -> None:
        super().__init__(16)

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        raise items[0].rows[0].damaged(ImageError("truncated", "it ends early"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Corpora of 16 and 8 training samples; an image of the second is damaged, in training and in validation."""
    root = tmp_path_factory.mktemp("two")
    write_prepared_corpus(root / "a", {"train": 16, "val": 8}, row_group_size=4)
    write_prepared_corpus(root / "b", {"train": 8, "val": 6, "test": 2}, row_group_size=4, broken=[1])
    return str(root / "a"), str(root / "b")


def test_what_an_epoch_takes_of_each_is_told(two: tuple[str, str]) -> None:
    a, b = two
    told = pretrain.samples_of_an_epoch(configured(f"[{{uri: {a}, weight: 1}}, {{uri: {b}, weight: 2}}]"))
    assert told == (
        f"an epoch of the split train draws 16 of 24 samples; left out: {epochs.NOT_YET} 8; "
        f"of its draws: 24 of 24 draws; draws by corpus: 8 of {a} (16 samples), 16 of {b} (8 samples)"
    )
    assert pretrain.samples_of_an_epoch(configured(f"[{a}, {b}]")) == (
        f"an epoch of the split train: 24 of 24 samples; draws by corpus: 16 of {a} (16 samples), 8 of {b} (8 samples)"
    )
    with pytest.raises(SplitError, match=f"{a}: the corpus has no split 'test'"):
        pretrain.samples_of_an_epoch(configured(f"[{a}, {b}]", "data.split=test"))
    with pytest.raises(CorpusError, match="/nosuch is not a prepared corpus"):
        pretrain.check(configured(f"[{a}, /nosuch]"))
    with pytest.raises(PlanError, match=f"the weight 1 of {b} is less than one of an epoch's 24 draws"):
        pretrain.samples_of_an_epoch(configured(f"[{{uri: {a}, weight: 100}}, {{uri: {b}, weight: 1}}]"))


def test_rows_come_from_the_corpus_they_lie_in_which_a_damaged_image_names(two: tuple[str, str]) -> None:
    corpora = Corpora.load(two).select("train")
    index = corpora.index()
    assert index.starts.tolist() == [0, 4, 8, 12, 16, 20, 24]
    groups = [decoding.unpacked(group) for group in decoding.read(index, [3, 4], ["image", "source_id"])]
    assert [group["source_id"].to_pylist()[0] for group in groups] == ["image-12.jpg", "image-0.jpg"]
    decoder = decoding.Decoder(index.corpus, 0, rotation.TurnedImage(16))
    where = {"group_of": np.array([0, 1]), "row_of": np.array([0, 0])}
    assert decoder(0, 0, np.array([12, 16]), groups, **where)["image"].shape == (2, 16, 16, 3)
    for row, message in ((0, f"^{two[0]}: the image"), (1, f"^{two[1]}: the image")):
        with pytest.raises(CorpusError, match=message):
            replace(decoder, views=Damaged())(0, 0, np.array([0]), groups, np.array([row]), np.array([0]))


def test_validation_joins_the_splits_and_names_the_corpus_of_a_damaged_image(
    two: tuple[str, str], tmp_path: Path
) -> None:
    model, transform, tokenizer = models.create(str(write_model(tmp_path / "model")))
    joined = Validator(two[0], ValidationConfig(max_samples=9), transform, tokenizer, others=[two[1]])
    assert [len(joined._samples), *joined._ends.values()] == [9, 5, 9]
    with pytest.raises(CorpusError, match=rf"^{two[1]}: the image of sample \w+ is damaged"):
        joined(model)


def test_validation_knows_the_classes_of_all_corpora_that_have_no_tree(tmp_path: Path) -> None:
    uris = [str(tmp_path / name) for name in "ab"]
    for uri, unlabelled in zip(uris, ((0, 1), (2, 3)), strict=True):
        manifest = write_prepared_corpus(Path(uri), {"val": 4}, unlabelled=unlabelled)
        manifest.model_copy(update={"ontology_sha256": None}).save(uri)
    _, transform, tokenizer = models.create(str(write_model(tmp_path / "model")))
    joined = Validator(uris[0], ValidationConfig(), transform, tokenizer, others=uris[1:])
    assert joined._class_names == ["eczema", "melanoma", "nevus", "psoriasis"]
    assert joined._labels.tolist() == [-1, -1, 1, 2, 0, 3, -1, -1]


def test_a_resume_compares_the_digest_of_every_corpus(two: tuple[str, str]) -> None:
    corpora = Corpora.load(two)
    assert corpora.digest == "+".join(manifest.digest for manifest in corpora.manifests)
    info = checkpoint.CheckpointInfo("o/step-1", 1, "", {}, corpora.digest)
    checkpoint.require_same_run(info, trajectory={}, corpus_digest=corpora.digest)
    other = f"{corpora.manifests[0].digest}+{'0' * 64}"
    with pytest.raises(CheckpointError, match=r"trained on another corpus 2 of 2 \(digest \w{12}, now 0{12}\)"):
        checkpoint.require_same_run(info, trajectory={}, corpus_digest=other)
    with pytest.raises(CheckpointError, match=r"trained on other corpora \(2, now 1\)"):
        checkpoint.require_same_run(info, trajectory={}, corpus_digest=corpora.manifests[0].digest)
    report = Leakage("r", two[1], corpora.manifests[1].digest, 4, (), frozenset())
    with pytest.raises(EvaluationError, match="trained on others besides"):
        report.require_about([], corpora.digest)
    of_both = replace(report, training_digest=corpora.digest)
    of_both.require_about([], "+".join(reversed(corpora.digest.split("+"))))
    with pytest.raises(EvaluationError, match="trained on 1 of these 2 alone"):
        of_both.require_about([], corpora.manifests[0].digest)


def test_trees_that_differ_are_told(two: tuple[str, str], tmp_path: Path) -> None:
    manifest = write_prepared_corpus(tmp_path / "other", {"train": 8})
    manifest.model_copy(update={"ontology_sha256": None}).save(str(tmp_path / "other"))
    keys = ("optim.warmup_steps=0", "train.log_every_steps=1")
    (told,) = pretrain.without_effect(configured(f"[{tmp_path / 'other'}, {two[0]}]", *keys))
    assert f"different disease trees: the model folder gets that of {two[0]}" in told
    assert pretrain.without_effect(configured(f"[{two[0]}, {two[1]}]", *keys)) == []
