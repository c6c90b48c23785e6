"""The zero-shot classifier, its probabilities and its metrics equal the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate.metrics import classification
from dermray.evaluate.zero_shot import TEMPLATES, classifier_weights, probabilities

FOLDER = Path(__file__).parent


@pytest.fixture(params=["zero_shot_ham7", "zero_shot_daffodil5"])
def golden(request):
    facts = json.loads((FOLDER / f"{request.param}.json").read_text())
    with np.load(FOLDER / f"{request.param}.npz") as arrays:
        return facts, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_templates_are_the_published_ones(golden):
    assert list(TEMPLATES) == golden[0]["templates"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classifier_and_probabilities(golden, dtype):
    _, arrays = golden
    weights = classifier_weights(arrays["text_features"].to(dtype))
    torch.testing.assert_close(weights.T.float(), arrays["classifier"], atol=1e-6, rtol=0)
    images = arrays["image_features"].to(dtype)
    torch.testing.assert_close((100.0 * images @ weights.T).float(), arrays["logits"], atol=1e-4, rtol=0)
    scores = probabilities(images, weights)
    torch.testing.assert_close(scores.float(), arrays["probs"], atol=1e-5, rtol=0)
    assert torch.equal(scores.argmax(dim=1), arrays["pred"])


def test_metrics_from_saved_logits(golden):
    facts, arrays = golden
    scores = torch.softmax(arrays["logits"], dim=1)
    metrics = classification(scores, arrays["labels"], bootstrap=0)
    names = {"auroc": "macro_auroc", "acc": "accuracy", "weighted_f1": "weighted_f1", "top5": "top5_accuracy"}
    for theirs, value in facts["metrics_float64"].items():
        assert metrics[names[theirs]].value == pytest.approx(value, abs=1e-9), theirs


def test_metrics_end_to_end_from_features(golden):
    facts, arrays = golden
    scores = probabilities(arrays["image_features"], classifier_weights(arrays["text_features"]))
    metrics = classification(scores, arrays["labels"], bootstrap=0)
    assert metrics["macro_auroc"].value == pytest.approx(facts["metrics_float64"]["auroc"], abs=1e-6)
    assert metrics["accuracy"].value == pytest.approx(facts["metrics_float64"]["acc"], abs=1e-9)


@pytest.fixture(scope="module")
def binary():
    facts = json.loads((FOLDER / "binary_zero_shot_bootstrap.json").read_text())
    with np.load(FOLDER / "binary_zero_shot_bootstrap.npz") as arrays:
        return facts, dict(arrays)


def test_benign_or_malignant(binary):
    facts, arrays = binary
    images, weights = (torch.from_numpy(arrays[name]) for name in ("image_features", "classifier"))
    scores = probabilities(images, weights.T)
    np.testing.assert_allclose(scores, arrays["probabilities"], atol=1e-5)
    found = classification(scores, arrays["labels"], bootstrap=0)
    published = facts["binary_zero_shot"]
    assert found["macro_auroc"].value == pytest.approx(published["auroc_as_released_macro_over_two_columns"], abs=1e-9)
    assert found["accuracy"].value == pytest.approx(published["accuracy"], abs=1e-12)


@pytest.mark.parametrize("case", ["binary", "multi", "multi_other"])
def test_scores_of_the_published_tables_before_their_bootstrap(binary, case):
    facts, arrays = binary
    scores, labels = {
        "binary": (arrays["probabilities"], arrays["labels"]),
        "multi": (arrays["mc_probabilities"], arrays["mc_labels"]),
        "multi_other": (arrays["mc_other_probabilities"], arrays["mc_labels"]),
    }[case]
    found = classification(scores, labels, bootstrap=0)
    names = {name: name for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1")}
    for ours, theirs in (names | {"macro_auroc": "auroc"}).items():
        assert found[ours].value == pytest.approx(facts["bootstrap"][case][theirs]["point"], abs=1e-9), ours
