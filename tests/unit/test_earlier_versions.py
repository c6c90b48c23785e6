"""Corpora, checkpoints, model folders and MLflow models of an earlier version load, resume and answer as they did."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from dermray import models
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.ingest import decoding
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.plan import EpochPlan
from dermray.ingest.tokens import portable
from dermray.predict import locate
from dermray.release import golden as gate
from dermray.service.engine.engine import Engine
from dermray.service.settings import ServeConfig
from dermray.train import checkpoint, loop, pretrain
from dermray.train.objectives.contrastive.module import Contrastive
from dermray.train.objectives.contrastive.views import ImageAndCaption
from dermray.train.optimiser import build_optimiser
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from dermray.vectors.encoder import Encoder
from tests.corpora import RGB, jpeg
from tests.recorded import Recorded, unpacked

NUM_STEPS = 6
NO_SCORES: dict[str, float] = {}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return unpacked(tmp_path_factory.mktemp("recorded"))


def batches(config: PretrainConfig, start_step: int) -> Iterator[Batch]:
    """What the loader's tasks would make, in this process."""
    manifest = Manifest.load(config.corpus).select(config.data.split)
    index = ShardIndex.of(config.corpus, manifest)
    tokens = portable(functools.partial(models.tokenizer, config.model, None))
    views = ImageAndCaption(config.data, 16, tokens)
    decoder = decoding.Decoder(config.corpus, config.seed, views)
    groups = [decoding.unpacked(group) for group in decoding.read(index, range(len(index.locations)), views.columns)]
    for step in range(start_step, NUM_STEPS):
        epoch, within = divmod(step, 3)
        plan = EpochPlan(manifest, seed=config.seed, epoch=epoch, global_batch_size=config.train.global_batch_size)
        samples = plan.rank_batch(within, 0, 1)
        group_of = np.searchsorted(index.starts, samples, side="right") - 1
        arrays = decoder(step, epoch, samples, groups, group_of, samples - index.starts[group_of])
        yield Batch(step, epoch, samples, {name: torch.from_numpy(array) for name, array in arrays.items()})


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(recorded: Recorded) -> None:
    config = pretrain.located(recorded.config("run"))
    assert pretrain.check(config) is None
    model, _, _ = models.create(config.model)
    cpu = torch.device("cpu")
    preprocess = models.preprocessing(model)
    color = ColorAugmentation(config.data, config.seed)
    trainer = loop.Trainer(
        config=config,
        objective=Contrastive(preprocess.mean, preprocess.std, cpu, color, config.loss),
        model=model.train(),
        wrapped=model,
        optimiser=build_optimiser(model, config.optim),
        device=cpu,
        num_steps=NUM_STEPS,
    )
    digest = Manifest.load(config.corpus).digest
    latest = checkpoint.load_latest(config.output, trajectory=config.trajectory(), corpus_digest=digest)
    assert latest is not None
    trainer.restore(latest[1])
    assert trainer.step == 3
    records: list[StepRecord] = []
    loop.run(
        trainer,
        batches(config, trainer.step),
        on_record=records.append,
        on_checkpoint=lambda *_: None,
        on_validation=lambda _: NO_SCORES,
    )
    expected = recorded.losses()
    losses = [(record.step, record.metrics["loss"]) for record in records if "loss" in record.metrics]
    assert losses == [(step, pytest.approx(expected[step], abs=1e-5)) for step in (4, 5, 6)]
    whole = safetensors.torch.load_file(recorded.root / "whole" / "model" / "open_clip_model.safetensors")
    start = safetensors.torch.load_file(recorded.root / "start" / "open_clip_model.safetensors")
    with trainer.averaged():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=0, msg=name)
    assert max(float((whole[name] - start[name]).abs().max()) for name in start) > 1e-3


def test_a_run_that_was_finished_is_finished(recorded: Recorded) -> None:
    finished = pretrain.check(recorded.config("whole"))
    assert finished is not None
    assert (finished.num_steps, finished.metrics["loss"]) == (NUM_STEPS, recorded.losses()[NUM_STEPS])


def test_a_model_gives_the_vectors_that_it_gave(recorded: Recorded) -> None:
    folder = str(recorded.root / "whole" / "model")
    golden = gate.Golden.load(folder)
    assert golden is not None
    encoder = Encoder.load(folder, device="cpu")
    np.testing.assert_allclose(encoder.encode_images(golden.images), golden.image_vectors, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(golden.texts), golden.text_vectors, atol=1e-5)


def asked() -> list[bytes]:
    return [jpeg(RGB["red"]), jpeg(RGB["black"])]


def test_a_logged_model_answers_through_mlflow_and_serving(recorded: Recorded, tmp_path: Path) -> None:
    expected = recorded.expected["predictions"]
    logged = mlflow.pyfunc.load_model(str(recorded.root / "logged"))
    answers = logged.predict(pd.DataFrame({"image": asked()}), params={"classify": True})
    assert answers["label"].tolist() == [one["label"] for one in expected]
    for answer, one in zip(answers["probabilities"], expected, strict=True):
        assert answer == pytest.approx(one["probabilities"], abs=1e-4)

    folder = str(recorded.root / "logged")
    engine = Engine(locate(folder), ServeConfig(model=folder, device="cpu"))
    assert all(check.passed for check in engine.examine())
    vectors = asyncio.run(engine.embed(asked(), [])).images
    np.testing.assert_allclose(vectors, [one["embedding"] for one in expected], atol=1e-4)
