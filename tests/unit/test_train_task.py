"""The contrastive task: which loss it computes, how it finds equal texts, micro-batches, and what models it refuses."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dermray import models
from dermray.errors import ModelError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.ingest.settings import DataConfig
from dermray.losses import ClipLoss, SigLipLoss
from dermray.train.objectives.contrastive.module import Contrastive, fit_to_loss, text_labels, trained_architecture
from dermray.train.objectives.contrastive.settings import LossConfig
from dermray.train.pretrain import check
from dermray.train.settings import PretrainConfig
from tests.corpora import write_model, write_prepared_corpus

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def make_model(**more: Any) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**MODEL_CFG, **more).train()


def batch(num: int = 10) -> Batch:
    """Some of its texts are equal."""
    random = np.random.default_rng(0)
    tokens = torch.from_numpy(random.integers(1, 64, (num, 12)))
    tokens[3:6] = tokens[0]
    pixels = torch.from_numpy(random.integers(0, 256, (num, 16, 16, 3), dtype=np.uint8))
    return Batch(step=0, epoch=0, draws=np.arange(num), arrays={"pixels": pixels, "tokens": tokens})


def backward(model: open_clip.CLIP, loss: LossConfig, micro_batch_size: int | None = None) -> tuple[Tensor, list[Any]]:
    model.zero_grad()
    task = Contrastive(MEAN, STD, CPU, ColorAugmentation(DataConfig(), 0), loss, micro_batch_size)
    value = task.backward(model, batch(), CPU, nullcontext).loss
    return value, [parameter.grad for parameter in model.parameters()]


def outputs(model: open_clip.CLIP) -> tuple[Tensor, ...]:
    pixels = batch()["pixels"].permute(0, 3, 1, 2).double() / 255
    normalised = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    return model(normalised.float(), batch()["tokens"])


@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_is_the_one_asked_for(name: Any, mask_duplicates: bool) -> None:
    model = make_model(init_logit_bias=-4.0) if name == "siglip" else make_model()
    labels = torch.tensor([0, 1, 2, 0, 0, 0, 6, 7, 8, 9]) if mask_duplicates else None
    loss = functools.partial(SigLipLoss() if name == "siglip" else ClipLoss(), labels=labels)
    expected = loss(*outputs(model)).detach()
    value, _ = backward(model, LossConfig(name=name, mask_duplicates=mask_duplicates))
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    unmasked = loss(*outputs(model), labels=None).detach()
    assert bool((value - unmasked).abs() > 1e-3) == mask_duplicates


@pytest.mark.parametrize("mask_duplicates", [False, True])
def test_two_draws_of_a_sample_are_no_negatives_of_each_other(mask_duplicates: bool) -> None:
    model, samples = make_model(), np.array([5, 6, 5, 7, 8, 9, 1, 2, 5, 3])
    loss = LossConfig(mask_duplicates=mask_duplicates)
    task = Contrastive(MEAN, STD, CPU, ColorAugmentation(DataConfig(), 0), loss)
    value = task.backward(model, replace(batch(), samples=samples), CPU, nullcontext).loss
    texts_are = [0, 1, 2, 0, 0, 0, 6, 7, 8, 9] if mask_duplicates else [*range(10)]
    labels = torch.stack([torch.from_numpy(samples), torch.tensor(texts_are)], dim=1)
    expected, unmasked = (ClipLoss()(*outputs(model), labels=each).detach() for each in (labels, labels[:, 1]))
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert (value - unmasked).abs() > 1e-3


@pytest.mark.parametrize("settings_of_loss", [{"name": "siglip"}, {"mask_duplicates": True}, {"method": "dense"}])
def test_micro_batches_and_methods_change_no_gradient(settings_of_loss: dict[str, Any]) -> None:
    loss = LossConfig(**settings_of_loss)
    model = make_model(init_logit_bias=-4.0) if loss.name == "siglip" else make_model()
    whole, expected = backward(model, loss.model_copy(update={"method": "local"}))
    for size in (1, 3, 10, 50):
        value, gradients = backward(model, loss, size)
        torch.testing.assert_close(value, whole, atol=1e-6, rtol=1e-6)
        for gradient, wanted in zip(gradients, expected, strict=True):
            # What the order of additions in float32 leaves, of the parameter's largest gradient.
            torch.testing.assert_close(gradient, wanted, atol=1e-6 + 2e-6 * float(wanted.abs().max()), rtol=0)


def test_the_task_tells_scale_and_bias() -> None:
    task = Contrastive(MEAN, STD, CPU, ColorAugmentation(DataConfig(), 0))
    assert task.report(make_model()).keys() == {"logit_scale"}
    assert task.report(make_model(init_logit_bias=-4.0))["logit_bias"] == -4.0


@given(
    st.lists(st.lists(st.integers(0, 50_000), min_size=4, max_size=4), min_size=2, max_size=30),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=100)
def test_texts_have_equal_labels_exactly_if_their_tokens_are_equal(rows: list[list[int]], padding: int) -> None:
    tokens = torch.tensor(rows)
    labels = text_labels(tokens)
    equal_tokens = (tokens[:, None] == tokens[None]).all(-1)
    assert torch.equal(labels[:, None] == labels[None], equal_tokens)
    assert torch.equal(text_labels(torch.nn.functional.pad(tokens, (0, padding))), labels)


def test_text_labels_do_not_depend_on_the_process() -> None:
    """Ranks compare them."""
    assert text_labels(torch.tensor([[1, 0], [0, 1], [3, 2]])).tolist() == [
        -2152535657050944081,
        7960286522194355701,
        -8983778000473672457,
    ]


def test_clip_refuses_a_model_with_a_bias_that_it_would_not_train(tmp_path: Path) -> None:
    """Such a parameter stays without gradient, which DDP takes for an error in the second step."""
    folder = write_model(tmp_path / "model", model_cfg=MODEL_CFG | {"init_logit_bias": -10.0})
    corpus = tmp_path / "corpus"
    write_prepared_corpus(corpus, {"train": 16}, row_group_size=8, samples_per_shard=16)
    config = {"corpus": str(corpus), "output": str(tmp_path / "output"), "model": str(folder)}
    with pytest.raises(ModelError, match=r"has a logit bias \(init_logit_bias=-10.0\), .*use loss.name=siglip"):
        check(PretrainConfig(**config, train={"global_batch_size": 8}))
    assert check(PretrainConfig(**config, train={"global_batch_size": 8}, loss={"name": "siglip"})) is None


def test_siglip_gives_a_model_the_bias_it_lacks_and_its_folder_says_so(tmp_path: Path) -> None:
    model, loss = make_model(), LossConfig(name="siglip")
    fit_to_loss(model, MODEL_CFG, loss)
    scale, bias = model(torch.zeros(1, 3, 16, 16), torch.ones(1, 12, dtype=torch.int64))[2:]
    assert scale.item() == pytest.approx(10)
    assert bias.item() == -10
    assert "logit_bias" in dict(model.named_parameters())
    with torch.no_grad():
        model.logit_bias.fill_(-7.5)
    folder = write_model(tmp_path / "model", model_cfg=MODEL_CFG)
    models.save(model, str(folder), model_cfg=trained_architecture(MODEL_CFG, loss), provenance={})
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert loaded.logit_bias.item() == -7.5


def test_a_model_that_fits_its_loss_stays_as_it_is() -> None:
    with_bias = MODEL_CFG | {"init_logit_bias": -4.0, "init_logit_scale": 1.0}
    assert trained_architecture(with_bias, LossConfig(name="siglip")) == with_bias
    assert trained_architecture(MODEL_CFG, LossConfig()) == MODEL_CFG
    model = make_model(init_logit_bias=-4.0)
    fit_to_loss(model, with_bias, LossConfig(name="siglip"))
    assert model.logit_bias.item() == -4
