"""The sparse autoencoder and the diagnosis from its units equal DermFM-Zero's, to the effect of switching units off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from dermray.audit.bottleneck import Bottleneck, match, without
from dermray.audit.sparse import SparseAutoencoder

FILE = Path(__file__).parent / "sae_concept_bottleneck.npz"
FACTS = json.loads(FILE.with_suffix(".json").read_text())
CONFIG = FACTS["config"]
PARAMETERS = ("tied_bias", "encoder_weight", "encoder_bias", "decoder_weight")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture
def model(arrays) -> SparseAutoencoder:
    model = SparseAutoencoder(CONFIG["d"], CONFIG["expansion"])
    model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in PARAMETERS})
    return model


@pytest.fixture
def split(arrays, model):
    """Activations and labels of those learnt from and of those tested."""
    with torch.no_grad():
        activations = model.encode(torch.from_numpy(arrays["cbm_features"])).numpy()
    train = slice(CONFIG["cbm_train"])
    test = slice(CONFIG["cbm_train"], None)
    return activations[train], arrays["cbm_labels"][train], activations[test], arrays["cbm_labels"][test]


def test_the_autoencoder_its_loss_gradients_and_a_step(arrays, model):
    vectors = torch.from_numpy(arrays["input"])
    code = model(vectors)
    np.testing.assert_allclose(code.activations.detach(), arrays["activations"], atol=1e-6)
    np.testing.assert_allclose(code.reconstruction.detach(), arrays["reconstruction"], atol=1e-6)
    loss = model.loss(vectors, l1=CONFIG["l1"])
    for mine, name in zip(loss, ("loss_total", "loss_l1_before_coefficient", "loss_reconstruction"), strict=True):
        assert mine.item() == pytest.approx(float(arrays[name]), abs=1e-6)
    optimiser = torch.optim.Adam(model.parameters(), lr=CONFIG["lr"])
    loss.total.backward()
    for name in PARAMETERS:
        published = f"grad_{name}_projected" if name == "decoder_weight" else f"grad_{name}"
        np.testing.assert_allclose(model.get_parameter(name).grad, arrays[published], atol=1e-6)
    optimiser.step()
    model.normalise()
    for name in ("tied_bias", "encoder_weight", "decoder_weight"):
        np.testing.assert_allclose(model.get_parameter(name).detach(), arrays[f"{name}_after_step"], atol=1e-5)


def scores(labels: np.ndarray, probabilities: np.ndarray) -> list[float]:
    predicted = probabilities >= 0.5
    return [
        float(roc_auc_score(labels, probabilities)),
        float(f1_score(labels, predicted, average="macro")),
        float(accuracy_score(labels, predicted)),
    ]


def test_the_diagnosis_from_units_and_without_some(arrays, model, split):
    train, train_labels, test, labels = split
    bottleneck = Bottleneck.fit(train, train_labels)
    np.testing.assert_allclose(bottleneck.weights, arrays["cbm_weights"], atol=1e-4)
    assert bottleneck.intercept == pytest.approx(float(arrays["cbm_intercept"]), abs=1e-4)
    before = bottleneck.probabilities(test)
    np.testing.assert_allclose(before, arrays["cbm_test_probability"], atol=1e-5)
    assert scores(labels, before) == pytest.approx(FACTS["test_auroc_f1macro_acc_before"], abs=1e-9)
    directions = model.decoder_weight.detach()
    matched = match(arrays["concept_embedding"], directions, bottleneck, count=CONFIG["top_n"])
    np.testing.assert_array_equal(matched.units, arrays["matched_neurons_by_importance"])
    np.testing.assert_allclose(matched.similarity, arrays["matched_similarity"], atol=1e-6)
    np.testing.assert_array_equal(matched.rank, arrays["matched_importance_rank"])
    strongest = bottleneck.strongest(CONFIG["top_n"])
    np.testing.assert_array_equal(strongest, arrays["topk_neurons"])
    for units, name in ((matched.units, "matching"), (strongest, "topk")):
        after = bottleneck.probabilities(without(test, units))
        np.testing.assert_allclose(after, arrays[f"cbm_test_probability_after_{name}"], atol=1e-5)
        assert scores(labels, after) == pytest.approx(FACTS[f"test_auroc_f1macro_acc_after_{name}"], abs=1e-9)


def test_weights_from_which_probabilities_follow_exactly(arrays, split):
    given = Bottleneck(arrays["cbm_weights"], float(arrays["cbm_intercept"]))
    np.testing.assert_allclose(given.probabilities(split[2]), arrays["cbm_test_probability"], atol=1e-6)
