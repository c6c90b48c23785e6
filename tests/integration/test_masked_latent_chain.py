"""Images alone, all the way: pretrained with a worker killed, exported, probed, and the tower of a DermLIP model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dermray import models
from dermray.commands import evaluate
from dermray.config import parse
from dermray.models import weights
from dermray.train import toy
from dermray.train.pretrain import PretrainResult, pretrain
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from tests.conftest import ROOT
from tests.corpora import write_prepared_corpus
from tests.fault.test_pretrain_kill import Killer, training_workers, wait_for

pytestmark = [
    *(pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)),
    pytest.mark.usefixtures("ray_cluster"),
]
NUM_STEPS = 24


def learned(corpora: list[Path], output: Path) -> tuple[PretrainResult, list[StepRecord]]:
    """The toy of the recipe on two corpora, one of them without texts and labels."""
    shares = ", ".join(f"{{uri: {corpus}, weight: {weight}}}" for corpus, weight in zip(corpora, (2, 1), strict=True))
    keys = [
        *("--config", str(ROOT / "jobs/configs/panderm_continue.yaml"), f"corpus=[{shares}]", f"output={output}"),
        *("toy=true", "num_workers=2", "tracking.enabled=false", "validation.every_steps=1", "seed=3"),
    ]
    config = toy.shrunk(parse(PretrainConfig, keys))
    shorter = {
        "train": config.train.model_copy(update={"max_steps": NUM_STEPS, "checkpoint_every_steps": NUM_STEPS // 4}),
        "validation": config.validation.model_copy(update={"every_steps": NUM_STEPS}),
    }
    records: list[StepRecord] = []
    return pretrain(config.model_copy(update=shorter), on_record=records.append), records


def test_images_alone_are_learned_from_killed_probed_and_become_a_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    corpora = [tmp_path / "labelled", tmp_path / "photographs"]
    write_prepared_corpus(corpora[0], {"train": 160, "val": 48}, samples_per_shard=32)
    write_prepared_corpus(
        corpora[1], {"train": 160, "val": 16}, samples_per_shard=32, unlabelled=range(160), without_raw=range(160)
    )
    whole, records = learned(corpora, tmp_path / "whole")
    wait_for(lambda: not training_workers(), "the end of the workers", interval_s=0.2)
    killer = Killer(tmp_path / "killed")
    killer.start()
    killed, _ = learned(corpora, tmp_path / "killed")
    killer.join(1)
    assert killer.killed is not None, "no worker was killed"
    assert not killer.finished_at_kill
    assert killed.weights_sha256 == whole.weights_sha256
    figures = {record.step: record.metrics for record in records}
    assert figures[NUM_STEPS]["validation_knn_accuracy"] >= 0
    assert figures[NUM_STEPS]["validation_effective_rank"] > 1

    folder = tmp_path / "killed" / "model"
    assert json.loads((folder / "dermray.json").read_text())["recipe"]["objective"]["teacher"] == "ema"
    report = tmp_path / "report"
    scored = [f"model={folder}", f"corpus={corpora[0]}", "split=val", f"output={report}", "tasks=[linear_probe,knn]"]
    assert evaluate.main([*scored, "bootstrap=200", "num_actors=1"]) == 0
    tasks = json.loads((report / "report.json").read_text())["tasks"]
    # Four colours, which any encoder of pixels tells apart.
    assert tasks["linear_probe"]["metrics"]["100pct_accuracy"]["value"] > 0.5

    dermlip, _, _ = models.create("panderm_tiny_bert", pretrained_image=str(folder))
    state = weights.read(str(folder))
    for name, value in dermlip.visual.state_dict().items():  # type: ignore[union-attr]
        assert name.startswith("head.") or torch.equal(value, state[f"encoder.{name}"]), name
