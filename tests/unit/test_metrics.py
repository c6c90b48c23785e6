"""Classification metrics equal scikit-learn's, on the data and on every bootstrap resample."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from dermray.errors import EvaluationError
from dermray.evaluate.statistics.bootstrap import resample_weights
from dermray.evaluate.statistics.metrics import METRIC_NAMES, Metric, classification, per_class


def draw(seed: int, num_samples: int, num_classes: int, *, decimals: int | None = None):
    """Labels that hold every class, and probabilities that know something about them; rounded ones have ties."""
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), generator.integers(0, num_classes, num_samples - num_classes)])
    logits = generator.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), labels] += 1.0
    if decimals is not None:
        logits = np.round(logits, decimals)
    scores = np.exp(logits)
    return scores / scores.sum(axis=1, keepdims=True), labels


def area(labels: np.ndarray, scores: np.ndarray, multi_class: str) -> float:
    if scores.shape[1] > 2:
        return reference.roc_auc_score(labels, scores, multi_class=multi_class)
    # scikit-learn looks at one column of two; rounding may tie in one column and not in the other.
    return float(np.mean([reference.roc_auc_score(labels == label, scores[:, label]) for label in (0, 1)]))


def expected(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same figures from scikit-learn."""
    predictions = scores.argmax(axis=1)
    num_classes = scores.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "accuracy": reference.accuracy_score(labels, predictions),
            "top5_accuracy": 1.0
            if num_classes <= 5
            else reference.top_k_accuracy_score(labels, scores, k=5, labels=range(num_classes)),
            "balanced_accuracy": reference.balanced_accuracy_score(labels, predictions),
            "macro_auroc": area(labels, scores, "ovr"),
            "macro_auroc_ovo": area(labels, scores, "ovo"),
            "weighted_f1": reference.f1_score(labels, predictions, average="weighted", zero_division=0),
            "macro_f1": reference.f1_score(labels, predictions, average="macro", zero_division=0),
            "quadratic_kappa": reference.cohen_kappa_score(labels, predictions, weights="quadratic"),
        }


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(0, 80), st.sampled_from([None, 0, 1]))
def test_points_equal_scikit_learn(seed, num_classes, extra, decimals):
    scores, labels = draw(seed, num_classes + extra + 1, num_classes, decimals=decimals)
    found = classification(scores, labels, bootstrap=0)
    assert tuple(found) == METRIC_NAMES
    for name, value in expected(scores, labels).items():
        assert found[name].value == pytest.approx(value, abs=1e-12), name
        assert found[name].low is None
        assert found[name].high is None


def test_intervals_equal_a_loop_over_resamples():
    scores, labels = draw(3, 90, 6, decimals=1)
    found = classification(scores, labels, bootstrap=40, seed=5)
    (weights,) = resample_weights(labels, 40, seed=5)
    resampled = []
    for column in weights.T:
        rows = np.repeat(np.arange(len(labels)), column.astype(int))
        resampled.append(expected(scores[rows], labels[rows]))
    for name in METRIC_NAMES:
        low, high = np.percentile([one[name] for one in resampled], [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=1e-6), name
        assert found[name].high == pytest.approx(high, abs=1e-6), name
        assert found[name].low < found[name].value < found[name].high or name == "top5_accuracy"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 99))
def test_resamples_keep_the_size_of_every_stratum(strata, num_resamples, seed):
    labels = np.array(strata)
    weights = np.concatenate(list(resample_weights(labels, num_resamples, seed)), axis=1)
    assert weights.shape == (len(labels), num_resamples)
    for stratum in np.unique(labels):
        members = labels == stratum
        np.testing.assert_array_equal(weights[members].sum(axis=0), members.sum())


def test_resamples_are_uniform():
    weights = np.concatenate(list(resample_weights(np.zeros(50, dtype=int), 4000, 0)), axis=1)
    # A share drawn 50 times at 1/50 has mean 1 and variance 0.98.
    np.testing.assert_allclose(weights.mean(axis=1), 1.0, atol=0.08)
    assert weights.var() == pytest.approx(0.98, abs=0.03)


def test_seeded():
    scores, labels = draw(0, 60, 4)
    assert classification(scores, labels, bootstrap=50, seed=1) == classification(scores, labels, bootstrap=50, seed=1)
    assert classification(scores, labels, bootstrap=50, seed=1) != classification(scores, labels, bootstrap=50, seed=2)


def test_torch_and_numpy_agree():
    scores, labels = draw(0, 60, 4)
    assert classification(torch.tensor(scores), torch.tensor(labels), bootstrap=20) == classification(
        scores, labels, bootstrap=20
    )


def test_absent_class_is_left_out_of_means():
    scores, labels = draw(1, 80, 5)
    present = labels != 2
    scores, labels = scores[present], labels[present]
    found = classification(scores, labels, bootstrap=0)
    areas = [reference.roc_auc_score(labels == label, scores[:, label]) for label in (0, 1, 3, 4)]
    assert found["macro_auroc"].value == pytest.approx(np.mean(areas), abs=1e-12)
    pairs = [
        reference.roc_auc_score(labels[(labels == a) | (labels == b)] == a, scores[(labels == a) | (labels == b), a])
        for a in (0, 1, 3, 4)
        for b in (0, 1, 3, 4)
        if a != b
    ]
    assert found["macro_auroc_ovo"].value == pytest.approx(np.mean(pairs), abs=1e-12)
    predictions = scores.argmax(axis=1)
    assert found["balanced_accuracy"].value == pytest.approx(
        np.mean([(predictions[labels == label] == label).mean() for label in (0, 1, 3, 4)])
    )
    assert found["macro_f1"].value == pytest.approx(reference.f1_score(labels, predictions, average="macro"))


def test_per_class_equals_scikit_learn():
    scores, labels = draw(2, 120, 4)
    found = per_class(scores, labels)
    predictions = scores.argmax(axis=1)
    precision, recall, f1, support = reference.precision_recall_fscore_support(labels, predictions)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_array_equal(found.num_samples, support)
    np.testing.assert_array_equal(found.confusion, reference.confusion_matrix(labels, predictions))
    areas = [reference.roc_auc_score(labels == label, scores[:, label]) for label in range(4)]
    np.testing.assert_allclose(found.auroc, areas)


def test_per_class_of_a_class_without_samples_is_nan():
    scores, labels = draw(2, 60, 3)
    found = per_class(scores[labels != 1], labels[labels != 1])
    assert np.isnan(found.recall[1])
    assert np.isnan(found.f1[1])
    assert np.isnan(found.auroc[1])
    assert found.num_samples[1] == 0


def test_many_resamples_in_several_chunks(monkeypatch):
    scores, labels = draw(4, 50, 3)
    monkeypatch.setattr("dermray.evaluate.statistics.bootstrap._CHUNK_WEIGHTS", 50 * 7)
    chunks = [part.shape[1] for part in resample_weights(labels, 20, 0)]
    assert chunks == [7, 7, 6]
    found = classification(scores, labels, bootstrap=20)["accuracy"]
    assert isinstance(found, Metric)
    assert found.low is not None
    assert found.low <= found.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, y: (np.where(np.arange(len(s))[:, None] == 3, np.nan, s), y), "sample 3 are not finite"),
        (lambda s, y: (s, np.where(np.arange(len(y)) == 2, 4, y)), "label 4 of sample 2 is outside the 4 classes"),
        (lambda s, y: (s, np.where(np.arange(len(y)) == 2, -1, y)), "label -1 of sample 2"),
        (lambda s, y: (s * 3, y), "row 0 is no probability distribution"),
        (lambda s, y: (s, np.zeros_like(y)), "need at least two"),
        (lambda s, y: (s, y.astype(float)), "must be integers"),
        (lambda s, y: (s[:-1], y), "must be"),
        (lambda s, y: (s[:0], y[:0]), "no sample"),
    ],
)
def test_bad_input_is_named(change, message):
    scores, labels = change(*draw(0, 30, 4))
    with pytest.raises(EvaluationError, match=message):
        classification(scores, labels)
