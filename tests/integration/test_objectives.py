"""An objective that lives in the tests alone trains on real workers as CLIP does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dermray.errors import StoppedError
from dermray.train.pretrain import pretrain
from dermray.train.progress import StepRecord
from tests import pretraining
from tests.corpora import write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.long
def test_an_objective_of_ones_own_trains_stops_and_resumes_with_two_workers(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over two corpora, of the smaller of which each sample is drawn more often."""
    root = tmp_path_factory.getbasetemp()
    other = tmp_path / "other"
    write_prepared_corpus(other, {"train": 20}, row_group_size=4)
    corpora = f"corpus=[{{uri: {pretraining.corpus(root)}, weight: 1}}, {{uri: {other}, weight: 1}}]"

    def run(output: Path, until_step: int | None = None) -> list[StepRecord]:
        keys = [
            corpora,
            "num_workers=2",
            "train.max_steps=6",
            "objective.kind=tests.choosy:OBJECTIVE",
            "objective.side=20",
        ]
        records: list[StepRecord] = []
        config = pretraining.configured(root, output, *keys)
        pretrain(config, on_record=records.append, until_step=until_step)
        return records

    whole = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "parts", until_step=3)
    rest = run(tmp_path / "parts")
    assert [record.step for record in rest] == [4, 5, 6]
    assert [record.metrics["loss"] for record in rest] == [record.metrics["loss"] for record in whole[3:]]
    assert whole[-1].metrics["num_right"] == pytest.approx(16 * whole[-1].metrics["accuracy"])
    one, resumed = (
        safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert one.keys() == resumed.keys()
    assert all(torch.equal(one[name], resumed[name]) for name in one)
    facts = json.loads((tmp_path / "parts" / "model" / "dermray.json").read_text())
    assert [share["weight"] for share in facts["corpus"]] == [1, 1]
    assert len(facts["corpus_digest"].split("+")) == 2
    assert facts["classes"] == ["eczema, dermatitis", "melanoma", "nevus", "psoriasis"]
