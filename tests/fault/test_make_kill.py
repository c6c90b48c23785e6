"""MAKE with two workers, one of which is killed mid-epoch, ends with the bits of a run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from dermray import models
from dermray.ingest.settings import DataConfig
from dermray.train.settings import PretrainConfig
from tests import pretraining
from tests.fault.test_pretrain_kill import Killer, training_workers, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600), pytest.mark.long]

KEYS = (
    "num_workers=2",
    "objective.kind=make",
    "objective.sub_captions=2",
    "objective.soft_targets=true",
    "train.micro_batch_size=4",
    "train.ema_decay=0.9",
    "validation.every_steps=8",
)


def configured(root: Path, output: Path) -> PretrainConfig:
    """Those of contrastive tests choose captions, which mean nothing here."""
    config = pretraining.configured(root, output, *KEYS)
    data = config.data.model_copy(update={"captions": DataConfig().captions})
    return config.model_copy(update={"data": data})


def test_a_killed_worker_changes_nothing(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    root = tmp_path_factory.getbasetemp()
    undisturbed, expected = pretraining.run(configured(root, tmp_path / "undisturbed"))
    wait_for(lambda: not training_workers(), "the end of earlier workers", interval_s=0.2)
    killer = Killer(tmp_path / "killed")
    killer.start()
    result, records = pretraining.run(configured(root, tmp_path / "killed"))
    killer.join(1)
    assert killer.killed is not None, "no worker was killed"
    assert not psutil.pid_exists(killer.killed)
    assert not killer.finished_at_kill
    assert result.weights_sha256 == undisturbed.weights_sha256

    figures = {record.step: record.metrics for record in expected if "mkcl" in record.metrics}
    assert len(figures) == pretraining.NUM_STEPS
    for record in records:
        for name in ("loss", "mkcl", "local"):
            assert record.metrics.get(name) == (figures[record.step][name] if name in record.metrics else None)
    assert expected[-1].metrics["validation_zero_shot_accuracy"] >= 0
    trained, _, _ = models.create(result.model_uri)
    begun, _, _ = models.create(str(pretraining.model(root)))
    assert not torch.equal(trained.state_dict()["visual.proj"], begun.state_dict()["visual.proj"])
