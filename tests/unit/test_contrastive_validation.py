"""The scores on held-out samples; that workers which share the work find the same is in tests/integration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dermray import models
from dermray.errors import CorpusError
from dermray.train.objectives.contrastive import validation
from dermray.train.objectives.contrastive.validation import Validator
from dermray.train.settings import ValidationConfig
from tests.corpora import write_model, write_prepared_corpus


@pytest.mark.parametrize(("count", "world_size"), [(10, 3), (4, 3), (2, 4), (1, 1), (8, 4)])
def test_parts_of_all_ranks_are_everything_once(count: int, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)
    padded: list[torch.Tensor] = []
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(validation, "world", lambda rank=rank: (rank, world_size))
        monkeypatch.setattr(validation, "gather_rows", lambda own: padded.append(own) or own)
        parts.append(rows[validation.part_of_rank(count)])
        validation.of_all_ranks(parts[-1], count, torch.device("cpu"))
    assert np.array_equal(np.concatenate(parts), rows)
    monkeypatch.setattr(validation, "gather_rows", lambda own: torch.cat(padded))
    assert np.array_equal(validation.of_all_ranks(parts[-1], count, torch.device("cpu")), rows)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"val": 10}, broken=[4])
    model, transform, tokenizer = models.create(str(write_model(tmp_path / "model")))
    validate = Validator(str(tmp_path / "corpus"), ValidationConfig(split="val"), transform, tokenizer)
    with pytest.raises(CorpusError, match=r"the image of sample \w{32} is damaged \(not_an_image\); prepare"):
        validate(model)
