"""Linear probe, label subsets, neighbours and few shots: what they compute, and what they refuse."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from dermray.errors import EvaluationError
from dermray.evaluate.knn import TEMPERATURE, vote
from dermray.evaluate.linear_probe import fit, label_fraction
from dermray.evaluate.probing import over_seeds
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.tasks.few_shot.module import draw
from dermray.evaluate.tasks.linear_probe.module import prefix


def clouds(seed: int, num: int, num_classes: int, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), generator.integers(0, num_classes, num - num_classes)])
    centres = generator.normal(size=(num_classes, width))
    points = centres[labels] + generator.normal(0, 0.7, size=(num, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def published_subset(labels: np.ndarray, fraction: float) -> np.ndarray:
    """The published selection, written with pandas."""
    table = pd.DataFrame({"label": labels, "row": np.arange(len(labels))})
    table = table.sample(frac=1, random_state=42).reset_index(drop=True)
    if fraction < 1:
        groups = [
            group.sample(n=min(len(group), max(1, int(len(group) * fraction))), random_state=42)
            for _, group in table.groupby("label")
        ]
        table = pd.concat(groups).sample(frac=1, random_state=42)
    return table["row"].to_numpy()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.999, 1.0]))
def test_subset_equals_pandas(labels: list[int], fraction: float) -> None:
    given_labels = np.array(labels)
    np.testing.assert_array_equal(label_fraction(given_labels, fraction), published_subset(given_labels, fraction))


def test_subset_depends_on_its_seed_and_keeps_every_class() -> None:
    labels = np.repeat(np.arange(7), [1, 5, 9, 40, 100, 200, 300])
    one, other = label_fraction(labels, 0.01), label_fraction(labels, 0.01, seed=43)
    assert set(labels[one]) == set(labels[other]) == set(range(7))
    assert sorted(one) != sorted(other)
    for wrong in (0.0, 1.5, -0.1):
        with pytest.raises(EvaluationError, match="label fraction"):
            label_fraction(labels, wrong)


def test_probe_leaves_the_global_generator_alone_and_is_seeded() -> None:
    features, labels = clouds(0, 60, 3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = fit(features, labels)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.weight, fit(features, labels).weight)


@pytest.mark.parametrize("seed", range(3))
def test_features_that_tell_nothing_give_the_classes_shares(seed: int) -> None:
    """The penalty holds all weights at 0 then, where the norm has a kink."""
    generator = np.random.default_rng(7)
    features, labels = generator.normal(size=(60, 16)), generator.integers(0, 2, 60)
    probe = fit(features, labels, seed=seed)
    assert not probe.weight.any()
    np.testing.assert_allclose(probe.predict_proba(features)[0], np.bincount(labels) / 60, atol=1e-12)


def test_probe_minimises_the_published_objective() -> None:
    features, labels = clouds(1, 90, 4)
    probe = fit(features, labels)
    inputs, targets = torch.from_numpy(features).double(), torch.from_numpy(labels)

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, targets)
        return loss + 0.5 / (8 * 4 / 100) * torch.linalg.norm(weight)

    best = float(objective(probe.weight, probe.bias))
    assert probe.objective == pytest.approx(best, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-3 * torch.randn(probe.weight.shape, generator=generator, dtype=torch.float64)
        assert float(objective(probe.weight + step, probe.bias)) > best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, np.where(y == 1, 2, y)), "class 1 has no sample"),
        (lambda x, y: (x, y - 1), "label -1 is negative"),
        (lambda x, y: (x, y * 0), "at least two classes"),
        (lambda x, y: (x, y.astype(float)), "must be integers"),
        (lambda x, y: (x[:-1], y), "one label a feature"),
        (lambda x, y: (np.where(np.arange(len(x))[:, None] == 4, np.nan, x), y), "sample 4 is not finite"),
        (lambda x, y: (x[0], y), r"features \[N, D\]"),
    ],
)
def test_probe_refuses(change, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        fit(*change(*clouds(0, 30, 3)))


def test_probe_refuses_features_of_another_width() -> None:
    probe = fit(*clouds(0, 30, 3))
    with pytest.raises(EvaluationError, match="width 8, these have 5"):
        probe.predict_proba(np.zeros((2, 5), dtype=np.float32))


@pytest.mark.parametrize("k", [1, 7, 500])
def test_neighbours_vote_as_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clouds(0, 120, 4)
    features, _ = clouds(3, 50, 4)
    neighbours = min(k, len(train))
    reference = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / TEMPERATURE)
    ).fit(train, labels)
    found = vote(features, train, labels, 4, k=k)
    np.testing.assert_allclose(found, reference.predict_proba(features), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    monkeypatch.setattr("dermray.evaluate.knn._BLOCK_SCORES", 700)
    np.testing.assert_allclose(vote(features, train, labels, 4, k=k), found, atol=1e-6)


def test_no_neighbours_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="at least one training image"):
        vote(np.zeros((1, 2)), np.zeros((0, 2)), np.zeros(0, dtype=int), 2, k=5)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9))
def test_few_shots_are_that_many_of_each_class(labels: list[int], shots: int, seed: int) -> None:
    given_labels = np.array(labels)
    rows = draw(given_labels, shots, seed=seed)
    assert len(set(rows)) == len(rows)
    for label, size in zip(*np.unique(given_labels, return_counts=True), strict=True):
        assert (given_labels[rows] == label).sum() == min(size, shots)


def test_mean_over_seeds_has_the_interval_of_students_t() -> None:
    runs = [{"accuracy": Metric(value)} for value in (0.5, 0.6, 0.7)]
    found = over_seeds(runs)["accuracy"]
    assert found.value == pytest.approx(0.6)
    # Three values: t of 2 degrees of freedom is 4.3027, the standard error 0.1 / sqrt(3).
    assert found.high == pytest.approx(0.6 + 4.30265 * 0.1 / 3**0.5, abs=1e-4)
    assert over_seeds(runs[:1]) == runs[0]


def test_names_of_label_fractions() -> None:
    assert [prefix(fraction) for fraction in (0.01, 0.1, 0.125, 1.0)] == ["1pct", "10pct", "12.5pct", "100pct"]


def test_a_larger_cost_weakens_the_penalty() -> None:
    features, labels = clouds(1, 80, 3)
    middle, weaker, stronger = (fit(features, labels, cost=cost) for cost in (100.0, 1000.0, 20.0))
    assert 0 < stronger.weight.norm() < middle.weight.norm() < weaker.weight.norm()
    # The objective of the docstring, at both optima: each beats the other on its own.
    loss = torch.nn.functional.cross_entropy
    for cost, fitted, other in ((1000.0, weaker, middle), (20.0, stronger, middle)):
        penalty = 0.5 / (cost * features.shape[1] * 3 / 100)

        def objective(probe, penalty=penalty):
            logits = torch.from_numpy(features).double() @ probe.weight.T + probe.bias
            return float(loss(logits, torch.from_numpy(labels)) + penalty * probe.weight.norm())

        assert objective(fitted) < objective(other)
        assert fitted.objective == pytest.approx(objective(fitted))
