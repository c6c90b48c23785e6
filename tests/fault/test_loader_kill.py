"""A decoding process that is killed inside its task costs the run nothing: same batches, in the same order."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray import models
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Batch, Loader
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import AsGiven
from dermray.train.objectives.contrastive.views import ImageAndCaption
from tests import pretraining

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_STEPS = 7
NUM_KILLS = 3


def lethal_tokenizer(model: str, killed: Path, driver: int) -> Callable[[list[str]], torch.Tensor]:
    """Kills the process of the first tasks that call it, and leaves a file each time."""
    encode = models.tokenizer(model)

    def tokenizer(texts: list[str]) -> torch.Tensor:
        kills = len(list(killed.iterdir()))
        if os.getpid() != driver and kills < NUM_KILLS:
            (killed / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(texts)

    return tokenizer


def batches(root: Path, tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]]) -> list[Batch]:
    corpus = str(pretraining.corpus(root))
    loader = Loader(
        corpora=Corpora.load([corpus]).select("train"),
        settings=DataConfig(),
        views=ImageAndCaption(DataConfig(), 24, AsGiven(tokenizer)),
        seed=5,
        global_batch_size=pretraining.GLOBAL_BATCH_SIZE,
        rank=0,
        world_size=1,
        num_steps=NUM_STEPS,
    )
    return list(loader.batches())


@pytest.mark.long
def test_killed_decoding_processes_change_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp()
    model = str(pretraining.model(root))
    undisturbed = batches(root, functools.partial(models.tokenizer, model))
    disturbed = batches(root, functools.partial(lethal_tokenizer, model, tmp_path, os.getpid()))
    assert len(list(tmp_path.iterdir())) >= NUM_KILLS
    assert len(disturbed) == len(undisturbed) == NUM_STEPS
    for got, expected in zip(disturbed, undisturbed, strict=True):
        assert got.step == expected.step
        np.testing.assert_array_equal(got.draws, expected.draws)
        assert torch.equal(got["pixels"], expected["pixels"])
        assert torch.equal(got["tokens"], expected["tokens"])
