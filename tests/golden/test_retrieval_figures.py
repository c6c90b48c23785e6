"""Ranks and retrieval metrics equal the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate.retrieval import pair_ranks, retrieval_metrics

FOLDER = Path(__file__).parent
# The file holds these two as float32 values written out in full.
FLOAT32_FIGURES = ("image_to_text_R@100", "text_to_image_R@100")


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "retrieval_metrics.npz") as file:
        return dict(file)


def test_ranks_are_exact(arrays):
    to_text, to_image = pair_ranks(arrays["image_features"], arrays["text_features"])
    np.testing.assert_array_equal(to_text.higher, arrays["ranks_image_to_text"])
    np.testing.assert_array_equal(to_image.higher, arrays["ranks_text_to_image"])
    assert not to_text.tied.any()
    assert not to_image.tied.any()


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda a: torch.from_numpy(a).double()])
def test_metrics(arrays, convert):
    facts = json.loads((FOLDER / "retrieval_metrics.json").read_text())["metrics_float64"]
    metrics = retrieval_metrics(convert(arrays["image_features"]), convert(arrays["text_features"]))
    assert set(metrics) == set(facts)
    for name, value in facts.items():
        assert metrics[name] == pytest.approx(value, abs=1e-7 if name in FLOAT32_FIGURES else 1e-9), name
