"""The linear probe, its scores and its label subsets equal the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate.linear_probe import fit, label_fraction
from dermray.evaluate.metrics import classification

FOLDER = Path(__file__).parent
FACTS = json.loads((FOLDER / "linear_probe_5class.json").read_text())
NAMES = {
    "acc": "accuracy",
    "bacc": "balanced_accuracy",
    "kappa": "quadratic_kappa",
    "weighted_f1": "weighted_f1",
    "auroc": "macro_auroc_ovo",
}


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "linear_probe_5class.npz") as file:
        return dict(file)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_probabilities_and_objective(arrays, convert):
    probe = fit(convert(arrays["train_features"]), convert(arrays["train_labels"]), seed=0)
    assert probe.objective == pytest.approx(FACTS["objective_true_optimum_float64"], abs=1e-8)
    found = probe.predict_proba(convert(arrays["test_features"]))
    assert isinstance(found, type(convert(arrays["probs"])))
    atol = 3 * FACTS["tolerance"]["reference_vs_true_optimum_probs_max_abs_diff"]
    np.testing.assert_allclose(np.asarray(found), arrays["probs"], atol=atol, rtol=0)
    np.testing.assert_array_equal(np.asarray(found).argmax(axis=1), arrays["pred"])


def test_another_start_reaches_the_same_optimum(arrays):
    probe = fit(arrays["train_features"], arrays["train_labels"], seed=7)
    assert probe.objective == pytest.approx(FACTS["objective_true_optimum_float64"], abs=1e-8)
    np.testing.assert_allclose(probe.predict_proba(arrays["test_features"]), arrays["probs"], atol=1e-3)


def test_scores_from_saved_probabilities(arrays):
    found = classification(arrays["probs"], arrays["test_labels"], bootstrap=0)
    for theirs, ours in NAMES.items():
        assert found[ours].value == pytest.approx(FACTS["metrics_float64"][theirs], abs=1e-9), theirs


def test_label_subsets_are_exact():
    with np.load(FOLDER / "label_fraction_subset.npz") as file:
        table = dict(file)
    train = np.flatnonzero(table["split"] == 0)
    for name, fraction in (("0p1", 0.1), ("0p5", 0.5), ("1", 1)):
        found = train[label_fraction(table["label"][train], fraction)]
        np.testing.assert_array_equal(found, table[f"selected_rows_frac_{name}"])
