"""The published figures of both losses, and two processes that compute ours; started once for all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dermray.losses import ClipLoss, SigLipLoss
from tests.contrastive import CLIP_METHODS, value_and_gradients
from tests.process_groups import run_ranks

LOSSES = Path(__file__).parent / "clip_siglip_loss.npz"


def load(name: str) -> torch.Tensor:
    with np.load(LOSSES) as arrays:
        return torch.from_numpy(arrays[name])


def _ask(rank: int, world_size: int) -> dict[str, Any]:
    rows = slice(rank * 6, (rank + 1) * 6)
    image, text = load("image_features")[rows], load("text_features")[rows]
    answers = {
        method: value_and_gradients(ClipLoss(method, tile_size=4), image, text, load("logit_scale"))  # type: ignore[arg-type]
        for method in CLIP_METHODS
    }
    scalars = load("siglip_logit_scale"), load("siglip_logit_bias")
    return answers | {"siglip": value_and_gradients(SigLipLoss(tile_size=4), image, text, *scalars)}


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[torch.Tensor]]]:
    """Of each rank and loss: the value and the gradients of image features, text features and scalars."""
    return run_ranks(_ask, (2,), tmp_path_factory.mktemp("two-ranks"))[2]
