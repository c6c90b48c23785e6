"""MAKE's objective on one process: equal to its plain form, and what may change nothing does not."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dermray.errors import ConfigError
from dermray.losses import ClipLoss, MakeLoss
from dermray.losses.make import local_vectors, objective
from dermray.losses.make.loss import Kinds
from tests.make import MakeInputs, make_inputs, naive_make, some_similarity

close = functools.partial(torch.testing.assert_close, atol=1e-9, rtol=1e-9)
NUM = 5
LABELS = torch.tensor([2, -1, 0, 2, -1])


def leaves(inputs: MakeInputs) -> MakeInputs:
    return MakeInputs(*(each if each.dtype == torch.bool else each.clone().requires_grad_() for each in inputs))


def gradients(inputs: MakeInputs) -> list[torch.Tensor]:
    return [each.grad for each in inputs if each.grad is not None]


@pytest.mark.parametrize(("texts", "tile_size"), [(1, None), (3, 1), (6, 4)])
@pytest.mark.parametrize("negatives", ["all", "valid"])
@pytest.mark.parametrize("graded", ["hard", "soft", "kl", "samples", "texts"])
def test_terms_and_gradients_are_those_of_the_plain_form(texts, tile_size, negatives, graded):
    inputs = make_inputs(texts, NUM, texts)
    soft = {"labels": LABELS, "similarity": some_similarity(3)} if graded in ("soft", "kl") else {}
    kinds = {"samples": {"samples": LABELS}, "texts": {"texts": torch.arange(NUM * texts).view(NUM, texts) % 5}}
    left_out = kinds.get(graded, {})
    mine, plain = leaves(inputs), leaves(inputs)
    choices = {
        "negatives": negatives,
        "tile_size": tile_size,
        "divergence": "kl" if graded == "kl" else "cross_entropy",
    }
    loss = MakeLoss(**choices)
    terms = loss.of_vectors(*mine, **soft, kinds=Kinds(**left_out) if left_out else None)
    expected = naive_make(plain, negatives=negatives, kl=graded == "kl", **soft, **left_out)
    for name, value in expected.items():
        close(terms[name], value.to(torch.float64))
    terms.total.backward()
    ((expected["i2t"] + expected["t2i"]) / 2 + 0.7 * expected["local"]).backward()
    assert len(gradients(mine)) == 4
    for got, wanted in zip(mine, plain, strict=True):
        if got.grad is not None:
            close(got.grad, torch.zeros_like(got) if wanted.grad is None else wanted.grad)


@given(st.integers(0, 2**31), st.permutations(range(NUM)), st.permutations(range(3, 7)))
@settings(deadline=None, max_examples=12)
def test_the_order_of_samples_and_of_sub_captions_changes_nothing(seed, samples, subs):
    inputs = make_inputs(seed, NUM, 7)
    order = torch.tensor([0, 1, 2, *subs])
    samples = torch.tensor(samples)
    moved = MakeInputs(
        inputs.image[samples],
        inputs.local[samples],
        inputs.text[samples][:, order],
        inputs.valid[samples][:, order],
        inputs.scale,
    )
    one, other = leaves(inputs), leaves(moved)
    values = [
        objective(*each, labels=labels, similarity=some_similarity(3))
        for each, labels in ((one, LABELS), (other, LABELS[samples]))
    ]
    for name in ("total", "i2t", "t2i", "local"):
        close(values[0][name], values[1][name])
    for value in values:
        value.total.backward()
    close(one.image.grad[samples], other.image.grad)
    close(one.text.grad[samples][:, order], other.text.grad)


@given(st.integers(0, 2**31), st.integers(1, 9))
@settings(deadline=None, max_examples=12)
def test_one_text_a_sample_is_the_clip_loss(seed, num):
    inputs = make_inputs(seed, num, 1)
    close(
        objective(*inputs, lambda_s=0.0).total,
        ClipLoss()(inputs.image, inputs.text[:, 0], inputs.scale),
    )
    assert objective(*inputs).local == 0, "the raw caption is no target of patches"


@given(st.integers(0, 2**31), st.sampled_from(["all", "valid"]), st.booleans())
@settings(deadline=None, max_examples=12)
def test_samples_without_sub_captions_or_without_a_diagnosis_are_finite(seed, negatives, soft):
    inputs = leaves(make_inputs(seed, NUM, 6))
    inputs.valid[::2, 3:] = False
    inputs.valid[1, 1] = False
    graded = {"labels": torch.full((NUM,), -1), "similarity": some_similarity(3)} if soft else {}
    objective(*inputs, negatives=negatives, **graded).total.backward()
    assert all(bool(each.isfinite().all()) for each in gradients(inputs))


def test_a_batch_without_any_text_gives_nothing_to_learn():
    for negatives in ("all", "valid"):
        inputs = leaves(make_inputs(0, NUM, 6))
        inputs.valid[:] = False
        value = objective(*inputs, negatives=negatives).total
        value.backward()
        assert value == 0
        assert all(bool((each == 0).all()) for each in gradients(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
def test_a_sample_without_any_valid_text_leaves_soft_targets_finite(dtype, temperature, divergence):
    for missing in ([1], range(4)):
        made = make_inputs(0, 4, 6)
        inputs = leaves(type(made)(*(each.to(dtype) if each.is_floating_point() else each for each in made)))
        inputs.valid[list(missing)] = False
        terms = objective(
            *inputs, labels=torch.tensor([0, 1, 0, -1]), similarity=torch.eye(2), temperature=temperature,
            divergence=divergence, negatives="valid",
        )  # fmt: skip
        terms.total.backward()
        assert terms.total.isfinite()
        assert all(bool(each.isfinite().all()) for each in gradients(inputs))
    assert terms.total == 0


def test_what_does_not_fit_is_named_and_a_label_that_there_is_not_is_no_number():
    inputs = make_inputs(0, 4, 6)
    labels = torch.tensor([0, 1, 2, -1])
    patches = torch.ones(4, 3, 6)
    for call, message in (
        (lambda: MakeLoss()(inputs.image, patches[..., :5], *inputs[2:]), "needs patches"),
        (lambda: local_vectors(patches, patches[:3, 0]), r"patches \[B, P, D\] and raw captions"),
        (lambda: objective(*inputs, labels=labels[:3], similarity=torch.eye(3)), r"needs labels \[4\], got \[3\]"),
        (lambda: objective(*inputs, lambda_s=-1.0), "needs lambda_s of 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    # As `Ontology.similarity` gives it.
    assert objective(*inputs, labels=labels, similarity=torch.eye(3).numpy()).total.isfinite()
    for wrong in (3, 4, 9):
        labels[2] = wrong
        assert objective(*inputs, labels=labels, similarity=torch.eye(3)).total.isnan()


def test_local_vectors_have_the_gradient_of_their_formula():
    generator = torch.Generator().manual_seed(4)
    patches, text = (
        torch.randn(3, 5, 4, generator=generator, dtype=torch.float64),
        torch.randn(3, 4, generator=generator, dtype=torch.float64),
    )
    # Of the last image no patch is above the threshold.
    patches[2] = -text[2]
    leaves = patches.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(local_vectors, sigma=0.3), leaves)
    assert (local_vectors(*leaves, sigma=0.3)[2] == 0).all()


class Watched(TorchDispatchMode):
    """What is computed: names of operations, and the largest tensor that any of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        for each in made if isinstance(made, tuple | list) else (made,):
            # A view, such as a diagonal or a transpose, takes no memory.
            if isinstance(each, torch.Tensor) and each._base is None:
                self.largest = max(self.largest, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("graded", [False, True])
def test_nothing_is_as_large_as_images_times_texts_and_nothing_waits_for_the_device(graded):
    num, texts, patches, width, tile = 48, 11, 9, 8, 16
    inputs = leaves(make_inputs(1, num, texts, width))
    patch_features = torch.nn.functional.normalize(torch.randn(num, patches, width, dtype=torch.float64), dim=2)
    soft = {"labels": torch.arange(num) % 4 - 1, "similarity": some_similarity(3)} if graded else {}
    with Watched() as watched:
        loss = MakeLoss(tile_size=tile)
        loss(inputs.image, patch_features.requires_grad_(), inputs.text, inputs.valid, inputs.scale, **soft).backward()
    assert watched.largest <= max(num * texts * width, num * patches * width, tile * tile) < num * num * texts
    assert not any("local_scalar_dense" in name or "nonzero" in name for name in watched.names)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"mode": "as published"}, "no mode 'as published'; there are intended, released"),
        ({"negatives": "some"}, "no negatives 'some'"),
        ({"divergence": "js"}, "no divergence 'js'"),
        ({"beta": 1.5}, r"beta in \[0, 1\], got 0.07 and 1.5"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choices, message):
    with pytest.raises(ConfigError, match=message):
        MakeLoss(**choices)


def test_what_does_not_fit_together_is_refused():
    inputs = make_inputs(0, NUM, 4)
    for field, message in (("image", "needs images"), ("local", "needs images"), ("valid", "needs valid")):
        with pytest.raises(ConfigError, match=message):
            objective(*inputs._replace(**{field: getattr(inputs, field)[1:]}))
    with pytest.raises(ConfigError, match="both labels and similarity"):
        objective(*inputs, labels=LABELS)
    with pytest.raises(ConfigError, match=r"got \[5\] and \[3, 2\]"):
        objective(*inputs, labels=LABELS, similarity=some_similarity(3)[:, :2])
    with pytest.raises(ConfigError, match="not both"):
        MakeLoss().of_vectors(*inputs, labels=LABELS, similarity=some_similarity(3), kinds=Kinds(LABELS))
    with pytest.raises(TypeError, match="lambda_k"):
        objective(*inputs, lambda_k=0.4)
