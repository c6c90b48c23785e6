"""MakeLoss equals the published figures: the intended objective in all its parts, and the released code's as it is."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dermray.corpus.ontology import Ontology
from dermray.losses import MakeLoss
from dermray.losses.make import local_vectors, objective
from dermray.losses.soft import beta_at

HERE = Path(__file__).parent
close = functools.partial(torch.testing.assert_close, atol=0, rtol=1e-5)
close_gradient = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=0)


@functools.cache
def load(file: str) -> dict[str, Tensor]:
    with np.load(HERE / f"{file}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def leaves(arrays: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: arrays[name].clone().requires_grad_() for name in names}


def test_the_intended_objective_and_its_gradients():
    arrays = load("make_objective")
    given = leaves(arrays, "image_features", "patch_embeddings", "text_features", "logit_scale")
    image, patches, text, scale = given.values()
    loss = MakeLoss()
    value = loss(image, patches, text, arrays["caption_mask"].bool(), scale)
    value.backward()
    close(value.detach(), arrays["intent.total"])
    total, mkcl, *_, local = loss.terms
    close(total, mkcl + 0.7 * local)
    for name in ("total", "mkcl", "i2t", "t2i", "local"):
        close(loss.terms[name], arrays[f"intent.{name}"])
    for leaf, name in zip(given.values(), ("image", "patch", "text", "logit_scale"), strict=True):
        close_gradient(leaf.grad, arrays[f"intent.grad_{name}"])


@pytest.mark.parametrize(
    ("choices", "mask", "figures"),
    [
        ({"weights": False}, "caption_mask", {"total": "intent_unweighted.total", "i2t": "intent_unweighted.i2t"}),
        ({"weights": False}, "caption_mask", {"local": "intent_unweighted.local"}),
        ({"sigma": 0.2}, "caption_mask", {"total": "intent_sigma0p2.total"}),
        ({}, None, {"total": "intent_allvalid.total"}),
        *(
            ({"weights": False, "mode": mode}, mask, {term: f"ref.{term}_{end}" for term in ("mkcl", "i2t", "t2i")})
            for mode in ("intended", "released")
            for mask, end in (("caption_mask", "masked"), (None, "unmasked"))
        ),
    ],
)
def test_variants_of_the_objective(choices, mask, figures):
    arrays = load("make_objective")
    valid = torch.ones(5, 7, dtype=torch.bool) if mask is None else arrays[mask].bool()
    loss = MakeLoss(**choices)
    names = ("image_features", "patch_embeddings", "text_features")
    loss(*(arrays[name] for name in names), valid, arrays["logit_scale"])
    for term, figure in figures.items():
        close(loss.terms[term], arrays[figure])


@pytest.mark.parametrize(("mask", "end"), [("caption_mask", "masked"), (None, "unmasked")])
def test_gradients_of_the_released_contrastive_part(mask, end):
    arrays = load("make_objective")
    valid = torch.ones(5, 7, dtype=torch.bool) if mask is None else arrays[mask].bool()
    given = leaves(arrays, "image_features", "text_features", "logit_scale")
    image, text, scale = given.values()
    objective(image, image.detach(), text, valid, scale, mode="released", weights=False).mkcl.backward()
    for leaf, name in zip(given.values(), ("image", "text", "logit_scale"), strict=True):
        close_gradient(leaf.grad, arrays[f"ref.mkcl_{end}_grad_{name}"])


def test_the_released_total_has_the_faults_that_the_figures_record():
    """With the right local vectors and its own weights, skipped rows and targets."""
    arrays = load("make_objective")
    terms = objective(
        arrays["image_features"],
        arrays["intent.local_vector"],
        arrays["text_features"],
        arrays["caption_mask"],
        arrays["logit_scale"],
        mode="released",
    )
    close(terms.total, torch.tensor(4.733437538146973))


def test_local_vectors():
    arrays = load("make_objective")
    for sigma, name in ((0.0, "intent.local_vector"), (0.2, "intent_sigma0p2.local_vector")):
        got = local_vectors(arrays["patch_embeddings"], arrays["text_features"][:, 0], sigma=sigma)
        torch.testing.assert_close(got, arrays[name], atol=1e-6, rtol=0)
    arrays = load("make_forward_patch_weighting")
    for sigma, name in ((0.0, "0"), (0.1, "0p1"), (0.9, "0p9")):
        got = local_vectors(arrays["patch_embeddings"], arrays["text_features"], sigma=sigma)
        torch.testing.assert_close(got, arrays[f"weighted_sum_sigma_{name}"], atol=1e-6, rtol=0)


def graded(**choices):
    arrays = load("o_make_soft_targets")
    given = leaves(arrays, "image_features", "local_vector", "text_features", "logit_scale")
    image, local, text, scale = given.values()
    labels = {"labels": arrays["ontology_label"], "similarity": arrays["similarity_matrix"]}
    return given, objective(image, local, text, arrays["caption_mask"].bool(), scale, **labels, **choices)


def test_soft_targets_and_their_gradients():
    arrays = load("o_make_soft_targets")
    given, terms = graded()
    for name in ("total", "i2t", "t2i", "local"):
        close(terms[name].detach(), arrays[f"intended_{name}"])
    terms.total.backward()
    for leaf, name in zip(given.values(), ("image", "local_vector", "text", "logit_scale"), strict=True):
        close_gradient(leaf.grad, arrays[f"intended_grad_{name}"])


@pytest.mark.parametrize(
    ("choices", "term", "figure"),
    [
        ({"divergence": "kl"}, "total", "intended_total_KL"),
        ({"beta": 0.0}, "total", "intended_total_beta0"),
        ({"mode": "released", "weights": False}, "mkcl", "released_noweight_mkcl"),
        ({"mode": "released", "weights": False, "divergence": "kl"}, "mkcl", "released_noweight_mkcl_KL"),
        ({"mode": "released"}, "mkcl", "released_weight_mkcl"),
        ({"mode": "released"}, "total", "released_weight_total"),
    ],
)
def test_variants_of_soft_targets(choices, term, figure):
    close(graded(**choices)[1][term].detach(), load("o_make_soft_targets")[figure])


def test_the_released_local_term_and_gradient_of_soft_targets():
    arrays = load("o_make_soft_targets")
    given, terms = graded(mode="released", weights=False)
    close(0.7 * terms.local.detach(), arrays["released_noweight_local_term"])
    terms.mkcl.backward()
    close_gradient(given["image_features"].grad, arrays["released_noweight_grad_image"])


def test_similarities_along_the_tree():
    arrays = load("o_make_soft_targets")
    children: dict[str, list[str]] = {"root": []}
    for node, parent in enumerate(arrays["tree_parent"].tolist()):
        children.setdefault("root" if parent < 0 else str(parent), []).append(str(node))
    names = [str(node) for node in range(len(arrays["tree_parent"]))]
    np.testing.assert_array_equal(Ontology(children).similarity(names), arrays["similarity_matrix"].numpy())


def test_the_share_of_soft_targets_falls_as_in_the_published_curriculum() -> None:
    wanted = load("o_make_soft_targets")["curriculum_beta_per_epoch"]
    got = [beta_at(0.5, epoch, 15) for epoch in range(len(wanted))]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), wanted.double(), atol=1e-6, rtol=0)
