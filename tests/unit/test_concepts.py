"""Concepts: scores, areas and their intervals, which marks count, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dermray.corpus.ontology import Ontology
from dermray.errors import EvaluationError
from dermray.evaluate.concepts import Prompts, concepts_of, marks_of, mean_auroc, presence_scores
from dermray.evaluate.samples import Samples
from dermray.evaluate.statistics.bootstrap import resample_weights


def unit(seed: int, *shape: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def marked(*rows: list[str], looked_for: tuple[str, ...] = ()) -> Samples:
    return Samples(
        uri="u",
        split="all",
        corpus_digest="d",
        images=(),
        ids=[str(number) for number in range(len(rows))],
        captions=[None] * len(rows),
        labels=[[] for _ in rows],
        concepts=list(rows),
        ontology=Ontology.flat([]),
        concept_names=looked_for,
    )


def test_score_is_the_published_softmax_written_out(monkeypatch):
    images, target, reference = unit(0, 9, 5), unit(1, 3, 4, 5), unit(2, 3, 1, 5)
    for_target = np.einsum("nd,tkd->ntk", images, target).mean(axis=2) / 0.05
    for_reference = np.einsum("nd,td->nt", images, reference[:, 0]) / 0.05
    expected = (np.exp(for_target) / (np.exp(for_target) + np.exp(for_reference))).mean(axis=1)
    np.testing.assert_allclose(presence_scores(images, target, reference, temperature=0.05), expected, atol=1e-12)
    monkeypatch.setattr("dermray.predict.concepts._BLOCK_SCORES", 8)
    np.testing.assert_allclose(presence_scores(images, target, reference, temperature=0.05), expected, atol=1e-12)


def test_extreme_logits_stay_probabilities():
    image = np.eye(2)[:1]
    found = presence_scores(image, np.eye(2)[:1, None], -np.eye(2)[:1, None], temperature=1e-4)
    assert found[0] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": unit(2, 2, 1, 5)}, r"references \[T, 1, D\]"),
        ({"target": unit(1, 3, 5)}, r"targets \[T, K, D\]"),
        ({"target": np.zeros((3, 0, 5))}, "at least one prompt"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"image_features": np.full((2, 5), np.nan)}, "image features are not finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"image_features": unit(0, 9, 5), "target": unit(1, 3, 4, 5), "reference": unit(2, 3, 1, 5)}
    with pytest.raises(EvaluationError, match=message):
        presence_scores(**arguments | change)


def test_gradients_are_not_kept():
    target = torch.from_numpy(unit(1, 3, 4, 5)).requires_grad_()
    assert not presence_scores(
        torch.from_numpy(unit(0, 9, 5)), target, torch.from_numpy(unit(2, 3, 1, 5))
    ).requires_grad


def test_areas_and_intervals_equal_a_loop_over_resamples():
    generator = np.random.default_rng(0)
    marks = generator.integers(0, 2, size=(60, 3))
    marks[:, 2] = 0
    marks[:3, 2] = 1
    scores = np.round(marks * 0.5 + generator.normal(size=(60, 3)), 1)
    mean, each = mean_auroc(scores, marks, bootstrap=200, seed=4)
    for column, metric in enumerate(each):
        assert metric.value == pytest.approx(roc_auc_score(marks[:, column], scores[:, column]), abs=1e-12)
    (weights,) = resample_weights(np.zeros(60, dtype=int), 200, seed=4)
    means, rare = [], []
    for column in weights.T:
        rows = np.repeat(np.arange(60), column.astype(int))
        areas = [
            roc_auc_score(marks[rows, one], scores[rows, one]) for one in range(3) if 0 < marks[rows, one].mean() < 1
        ]
        means.append(np.mean(areas))
        if 0 < marks[rows, 2].mean() < 1:
            rare.append(areas[2])
    # Three marked images of sixty are all missed by about one resample in twenty.
    assert len(rare) < 200
    assert (each[2].low, each[2].high) == pytest.approx(tuple(np.percentile(rare, [2.5, 97.5])), abs=1e-6)
    assert (mean.low, mean.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-6)


def test_a_concept_marked_everywhere_is_refused():
    with pytest.raises(EvaluationError, match="all 4 answers are True"):
        mean_auroc(np.ones((4, 1)), np.ones((4, 1)))


def test_which_concepts_are_asked_for():
    samples = marked(["Papule", "Scale"], ["glitter"], ["atypical pigment network"])
    assert concepts_of(samples)[0] == ["papule", "scale"]
    assert concepts_of(samples)[1] == ["atypical pigment network", "glitter"]
    fixed = marked(["papule"], ["atypical pigment network"], looked_for=("Pigment_Network", "papule", "sparkle"))
    assert concepts_of(fixed) == (["pigment network", "papule"], ["sparkle"])
    np.testing.assert_array_equal(marks_of(fixed, ["pigment network", "papule"]), [[0, 1], [1, 0]])
    with pytest.raises(EvaluationError, match="has published terms"):
        concepts_of(marked(["glitter"]))


def test_published_terms_keep_their_repetitions():
    terms = Prompts.load().terms
    assert len(terms) >= 48
    assert terms["streaks"].count("pigmented linear extensions") == 2
    assert len(Prompts.load().targets("streaks")) == 6 * 8
