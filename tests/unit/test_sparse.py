"""The sparse autoencoder as it begins and learns, units of a concept, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from dermray.audit.bottleneck import Bottleneck, match, without
from dermray.audit.sparse import SparseAutoencoder, fit
from dermray.errors import EvaluationError, ModelError


def vectors(count: int = 64, width: int = 6) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn)


def test_it_begins_as_the_released_code_does():
    torch.manual_seed(0)
    model = SparseAutoencoder(20, 5)
    assert not model.tied_bias.any()
    for weight, bound in ((model.encoder_weight, math.sqrt(6 / (100 * 20))), (model.encoder_bias, 1 / 10)):
        assert 0.95 * bound < weight.abs().max() <= bound
    torch.testing.assert_close(model.decoder_weight.norm(dim=0), torch.ones(100))


def test_the_decoders_gradient_leaves_lengths_alone_also_of_a_copy():
    model = copy.deepcopy(SparseAutoencoder(6, 3))
    model.loss(vectors()).total.backward()
    gradient = model.decoder_weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    torch.testing.assert_close((gradient * model.decoder_weight).sum(dim=0), torch.zeros(18), atol=1e-8, rtol=0)


def test_it_learns_the_same_each_time_and_leaves_the_global_draws_alone():
    state = torch.get_rng_state()
    settings = {"expansion": 4, "batch_size": 40, "learning_rate": 3e-2}
    models = [fit(vectors(), epochs=epochs, **settings) for epochs in (0, 15, 15)]
    assert torch.equal(torch.get_rng_state(), state)
    losses = [model.loss(vectors()).total.item() for model in models]
    assert losses[1] < 0.1 * losses[0]
    assert losses[1] == losses[2]
    torch.testing.assert_close(models[1].decoder_weight.norm(dim=0), torch.ones(24))
    sparser = fit(vectors(), epochs=15, l1=0.1, **settings)
    assert sparser.loss(vectors()).l1 < models[1].loss(vectors()).l1


def test_a_concept_is_found_among_units_that_have_a_weight():
    directions = np.array([[1.0, 0.0, 1.0, 0.6], [0.0, 1.0, 0.0, 0.8]])
    bottleneck = Bottleneck(np.array([0.0, 3.0, 2.0, -4.0]), 0.0)
    assert match([1, 0], directions, bottleneck, count=1).units.tolist() == [2]
    found = match([1, 0], directions, bottleneck, count=2)
    assert found.units.tolist() == [3, 2], "the larger weight first, whatever its sign"
    assert found.similarity.tolist() == [0.6, 1.0]
    assert found.rank.tolist() == [0, 2]
    assert match([1, 0], directions, bottleneck, count=9).units.tolist() == [3, 1, 2]
    assert bottleneck.strongest(2).tolist() == [3, 1]


def test_what_is_switched_off_is_so_in_the_answer_alone():
    activations = np.ones((2, 3), dtype=np.float32)
    assert without(activations, [0, 2]).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert activations.all()
    assert without(activations, []).all()


def test_the_diagnosis_learns_what_a_planted_unit_says():
    rng = np.random.default_rng(0)
    activations = rng.random((400, 8))
    labels = (activations[:, 5] > 0.5).astype(int)
    bottleneck = Bottleneck.fit(activations[:300], labels[:300])
    assert bottleneck.strongest(1).tolist() == [5]
    right = ((bottleneck.probabilities(activations[300:]) > 0.5) == labels[300:]).mean()
    blind = ((bottleneck.probabilities(without(activations[300:], [5])) > 0.5) == labels[300:]).mean()
    assert right > 0.9
    assert blind < 0.7


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseAutoencoder(0, 8), ModelError, "width 0"),
        (lambda: fit(torch.full((2, 3), torch.nan)), ModelError, r"got \[2, 3\]"),
        (lambda: fit(torch.zeros(0, 3)), ModelError, r"got \[0, 3\]"),
        (lambda: Bottleneck.fit(np.ones((3, 2)), [0, 1]), EvaluationError, r"\[3, 2\] and \[2\]"),
        (lambda: Bottleneck.fit(np.ones((2, 2)), [1, 1]), EvaluationError, "both"),
        (lambda: Bottleneck.fit(np.ones((3, 2)), [0, 1, 2]), EvaluationError, "0 from 1"),
        (lambda: match([1, 0], np.ones((3, 2)), Bottleneck(np.ones(2), 0.0), count=1), EvaluationError, r"\[3, 2\]"),
    ],
)
def test_what_does_not_fit_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
