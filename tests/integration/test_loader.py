"""The loader carries out the plan: same samples and same pixels for every world size and from any step on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import torch

from dermray import models, storage
from dermray.corpus.manifest import Manifest
from dermray.errors import CorpusError, PlanError
from dermray.ingest import augment
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Batch, Loader
from dermray.ingest.plan import EpochPlan
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import portable
from dermray.ingest.views import Arrays, ArraySpec, Item
from dermray.train.objectives.contrastive.views import ImageAndCaption
from tests import pretraining
from tests.conftest import ROOT
from tests.corpora import write_prepared_corpus
from tests.s3 import BUCKET, HALF, SLOW_DOWN, faulty_s3

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SEED = 3
STEPS_PER_EPOCH = 5
NUM_STEPS = 2 * STEPS_PER_EPOCH
SETTINGS = DataConfig(captions={"raw": 1.0, "ontology": 1.0}, crop_scale=(0.3, 1.0), horizontal_flip=0.5)


def make_loader(root: Path, rank: int, world_size: int, *, corpus: Path | None = None) -> Loader:
    corpus = corpus or pretraining.corpus(root)
    return loader_of(str(corpus), corpus, pretraining.model(root), rank, world_size)


def loader_of(shards: str, corpus: Path, model: Path, rank: int = 0, world_size: int = 1) -> Loader:
    """A loader that reads the shards of a corpus where they are said to be."""
    return Loader(
        corpora=Corpora.of(shards, Manifest.load(str(corpus)).select("train")),
        settings=SETTINGS,
        views=ImageAndCaption(SETTINGS, 24, portable(functools.partial(models.tokenizer, str(model)))),
        seed=SEED,
        global_batch_size=pretraining.GLOBAL_BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        num_steps=NUM_STEPS,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def alone(root: Path, ray_cluster: None) -> list[Batch]:
    return list(make_loader(root, 0, 1).batches())


def plan_of(root: Path, step: int) -> np.ndarray:
    manifest = Manifest.load(str(pretraining.corpus(root))).select("train")
    epoch, step_in_epoch = divmod(step, STEPS_PER_EPOCH)
    plan = EpochPlan(manifest, seed=SEED, epoch=epoch, global_batch_size=pretraining.GLOBAL_BATCH_SIZE)
    assert len(plan) == STEPS_PER_EPOCH
    return plan.batch(step_in_epoch)


def assert_same(left: Batch, right: Batch) -> None:
    assert left.step == right.step
    np.testing.assert_array_equal(left.draws, right.draws)
    assert left.arrays.keys() == right.arrays.keys() == {"pixels", "tokens"}
    for name in left.arrays:
        assert torch.equal(left[name], right[name]), name


def test_batches_are_those_of_the_plan(root: Path, alone: list[Batch]) -> None:
    assert [batch.step for batch in alone] == list(range(NUM_STEPS))
    for batch in alone:
        np.testing.assert_array_equal(batch.draws, plan_of(root, batch.step))
        assert batch["pixels"].shape == (pretraining.GLOBAL_BATCH_SIZE, 24, 24, 3)
        assert batch["pixels"].dtype == torch.uint8
        assert batch["tokens"].shape == (pretraining.GLOBAL_BATCH_SIZE, 24)
        assert batch["tokens"].dtype == torch.int32


def test_an_epoch_has_every_sample_once_and_the_next_treats_it_otherwise(alone: list[Batch]) -> None:
    seen: list[dict[int, torch.Tensor]] = [{}, {}]
    for batch in alone:
        for sample, pixels in zip(batch.draws.tolist(), batch["pixels"], strict=True):
            assert sample not in seen[batch.step // STEPS_PER_EPOCH]
            seen[batch.step // STEPS_PER_EPOCH][sample] = pixels
    assert set(seen[0]) == set(seen[1]) == set(range(pretraining.NUM_SAMPLES))
    changed = sum(not torch.equal(seen[0][sample], seen[1][sample]) for sample in seen[0])
    assert changed == pretraining.NUM_SAMPLES


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_same_samples_pixels_and_tokens(root: Path, alone: list[Batch], world_size: int) -> None:
    ranks = [list(make_loader(root, rank, world_size).batches()) for rank in range(world_size)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        together = Batch(
            step=parts[0].step,
            epoch=parts[0].epoch,
            draws=np.concatenate([part.draws for part in parts]),
            arrays={name: torch.cat([part[name] for part in parts]) for name in parts[0].arrays},
        )
        assert_same(together, alone[step])


@pytest.mark.parametrize("start_step", [3, 6])
def test_resumed_anywhere_it_yields_the_tail(root: Path, alone: list[Batch], start_step: int) -> None:
    tail = list(make_loader(root, 0, 1).batches(start_step))
    assert len(tail) == NUM_STEPS - start_step
    for resumed, original in zip(tail, alone[start_step:], strict=True):
        assert_same(resumed, original)


def test_a_run_may_end_inside_an_epoch_or_have_no_steps_left(root: Path) -> None:
    loader = make_loader(root, 0, 1)
    loader.num_steps = 1
    assert [batch.step for batch in loader.batches()] == [0]
    assert list(loader.batches(1)) == []


def test_a_world_that_the_plan_does_not_admit_is_refused_before_any_work(root: Path) -> None:
    with pytest.raises(PlanError, match="admit 1, 2, 4, 8 workers"):
        make_loader(root, 0, 3)


def test_a_damaged_image_is_named(root: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "damaged"
    manifest = write_prepared_corpus(corpus, {"train": 32}, broken=[5])
    assert manifest.num_samples == 32
    with pytest.raises(CorpusError, match="the image of sample [0-9a-f]{32} is damaged .*prepare the corpus again$"):
        list(make_loader(root, 0, 1, corpus=corpus).batches())


@dataclass(frozen=True)
class OddArrays:
    """Arrays of several dtypes, one of which has another shape every other step."""

    columns = ("width", "skin_type")

    def specs(self, step: int) -> dict[str, ArraySpec]:
        shape = (1 + step // 2 % 2, 3)
        return {
            "drawn": ArraySpec("float64", shape),
            "is_dark": ArraySpec("bool", ()),
            "width": ArraySpec("int16", (1,)),
        }

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        for place, item in enumerate(items):
            (row,) = item.rows
            out["drawn"][place] = item.random.random(out["drawn"].shape[1:])
            out["is_dark"][place] = row["skin_type"] > 3
            out["width"][place] = row["width"]


def test_any_arrays_are_carried_and_their_shapes_may_depend_on_the_step(root: Path, alone: list[Batch]) -> None:
    loader = replace(make_loader(root, 0, 1), views=OddArrays())
    skin_types = pq.ParquetDataset(pretraining.corpus(root) / "data").read(["skin_type", "split"])
    dark = skin_types.filter(pc.field("split") == "train")["skin_type"].to_numpy() > 3
    for batch, usual in zip(loader.batches(), alone, strict=True):
        assert batch.draws.tolist() == usual.draws.tolist()
        assert (batch["drawn"].dtype, batch["width"].dtype) == (torch.float64, torch.int16)
        assert batch["drawn"].shape == (pretraining.GLOBAL_BATCH_SIZE, 1 + batch.step // 2 % 2, 3)
        assert batch["is_dark"].tolist() == dark[batch.draws].tolist()
        assert batch["width"].tolist() == [[48]] * pretraining.GLOBAL_BATCH_SIZE
        for sample, drawn in zip(batch.draws.tolist(), batch["drawn"], strict=True):
            expected = augment.generator(SEED, batch.epoch, sample).random(drawn.shape)
            assert drawn.numpy().tolist() == expected.tolist()


def test_samples_are_drawn_by_counts_and_each_copy_is_treated_otherwise(root: Path) -> None:
    counts = np.arange(pretraining.NUM_SAMPLES) % 3
    loader = replace(make_loader(root, 0, 1), views=OddArrays(), counts=lambda epoch: np.roll(counts, epoch))
    loader.num_steps = 2 * loader.steps_per_epoch
    skin_types = pq.ParquetDataset(pretraining.corpus(root) / "data").read(["skin_type", "split"])
    dark = skin_types.filter(pc.field("split") == "train")["skin_type"].to_numpy() > 3
    seen: list[list[int]] = [[], []]
    for batch in loader.batches():
        samples, copies = batch.draws % len(counts), batch.draws // len(counts)
        np.testing.assert_array_equal(batch.samples, samples)
        assert (copies < np.roll(counts, batch.epoch)[samples]).all()
        assert batch["is_dark"].tolist() == dark[samples].tolist()
        for draw, drawn in zip(batch.draws.tolist(), batch["drawn"], strict=True):
            assert drawn.numpy().tolist() == augment.generator(SEED, batch.epoch, draw).random(drawn.shape).tolist()
        seen[batch.epoch] += batch.draws.tolist()
    for draws in seen:
        assert (
            len(set(draws))
            == len(draws)
            == counts.sum() // pretraining.GLOBAL_BATCH_SIZE * (pretraining.GLOBAL_BATCH_SIZE)
        )
    other = replace(make_loader(root, 0, 1), views=OddArrays(), counts=lambda epoch: counts + epoch)
    other.num_steps = 2 * other.steps_per_epoch
    with pytest.raises(PlanError, match=r"draws \d+ samples in epoch 1 and \d+ in epoch 0; all epochs"):
        list(other.batches())


def test_several_corpora_are_dealt_as_one(root: Path, tmp_path: Path) -> None:
    """Each row is read where its draw says, also where a window holds row groups of both corpora."""
    write_prepared_corpus(tmp_path / "other", {"train": 32}, row_group_size=8)
    uris = [str(pretraining.corpus(root)), str(tmp_path / "other")]
    corpora = Corpora.load(uris).select("train")
    both = replace(make_loader(root, 0, 1), corpora=corpora, views=OddArrays())
    both.num_steps = both.steps_per_epoch
    rows = [pq.ParquetDataset(f"{uri}/data").read(["skin_type", "split"]) for uri in uris]
    dark = np.concatenate([of.filter(pc.field("split") == "train")["skin_type"].to_numpy() for of in rows]) > 3
    seen = []
    for batch in both.batches():
        assert batch["is_dark"].tolist() == dark[batch.draws].tolist()
        seen += batch.draws.tolist()
    assert sorted(seen) == list(range(112))


def digests(batches: list[Batch]) -> list[list[object]]:
    """What batches are, in a form to compare over processes."""
    return [
        [
            batch.step,
            batch.draws.tolist(),
            hashlib.sha256(batch["pixels"].contiguous().numpy().tobytes()).hexdigest(),
            hashlib.sha256(batch["tokens"].numpy().tobytes()).hexdigest(),
        ]
        for batch in batches
    ]


@pytest.mark.long
def test_from_an_object_store_that_fails_come_the_same_batches(
    root: Path, alone: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a driver of its own, whose tasks are told where the store is."""
    folder = pretraining.corpus(root)
    with faulty_s3() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        storage._remote_filesystem.cache_clear()
        for file in folder.rglob("*.parquet"):
            storage.write_bytes(f"s3://{BUCKET}/corpus/{file.relative_to(folder)}", file.read_bytes())
        server.inject(SLOW_DOWN, 2, method="GET", key=".parquet")
        server.inject(HALF, 2, method="GET", key=".parquet")
        code = (
            "import json, ray, sys\n"
            "from pathlib import Path\n"
            "from tests.integration import test_loader as here\n"
            "ray.init(address=sys.argv[1], log_to_driver=False)\n"
            "loader = here.loader_of(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))\n"
            "print(json.dumps(here.digests(list(loader.batches()))))"
        )
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-c", code, address, f"s3://{BUCKET}/corpus", str(folder), str(pretraining.model(root))],
            cwd=ROOT,
            env={
                **os.environ,
                "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": server.environment}}),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert server.fired == 4
    storage._remote_filesystem.cache_clear()
    assert json.loads(done.stdout.splitlines()[-1]) == digests(alone)
