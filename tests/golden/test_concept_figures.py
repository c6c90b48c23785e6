"""Concept presence scores and their areas under the curve equal the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate.concepts import TEMPERATURE, Prompts, mean_auroc, presence_scores

FOLDER = Path(__file__).parent
FACTS = json.loads((FOLDER / "concept_annotation.json").read_text())
CONCEPTS = FACTS["config"]["concepts"]


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "concept_annotation.npz") as file:
        return dict(file)


def scores(arrays, convert, **settings):
    images, reference = convert(arrays["image_features_norm"]), convert(arrays["ref_norm"])
    found = [
        presence_scores(images, convert(arrays[f"target_norm_{number}"]), reference, **settings)
        for number in range(len(CONCEPTS))
    ]
    return np.stack([np.asarray(one) for one in found], axis=1)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda a: torch.from_numpy(a).double()])
def test_scores(arrays, convert):
    np.testing.assert_allclose(scores(arrays, convert), arrays["scores"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(scores(arrays, convert, temperature=0.05), arrays["scores_tau_0p05"], atol=2e-5, rtol=0)


def test_what_comes_out_is_of_the_kind_that_went_in(arrays):
    image, target, reference = arrays["image_features_norm"], arrays["target_norm_0"], arrays["ref_norm"]
    assert presence_scores(image, target, reference).dtype == np.float32
    found = presence_scores(*map(torch.from_numpy, (image, target, reference)))
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (len(image),))


def test_areas_and_their_mean(arrays):
    mean, each = mean_auroc(scores(arrays, np.asarray), arrays["gt"], bootstrap=0)
    for name, metric in zip(CONCEPTS, each, strict=True):
        assert metric.value == pytest.approx(FACTS["auroc_float64"][name], abs=1e-6), name
    assert mean.value == pytest.approx(FACTS["auroc_mean_float64"], abs=1e-6)


def test_published_words():
    prompts = Prompts.load()
    assert list(prompts.templates) == FACTS["prompt_templates"]
    assert list(prompts.references) == FACTS["reference_prompts"]
    for concept, terms in FACTS["config"]["terms"].items():
        assert list(prompts.terms[concept]) == terms
    assert pytest.approx(0.010108, abs=1e-6) == TEMPERATURE
