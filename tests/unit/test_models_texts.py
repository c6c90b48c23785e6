"""Texts without needless padding, and equal ones once: features and gradients stay what they are."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from dermray import models
from dermray.models import texts, towers

CPU = torch.device("cpu")
CONTEXT_LENGTH = 40
EOS = 63
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2, "eos_id": EOS}
# Without dropout: what is drawn depends on the shape.
BERT = {
    "model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": EOS}


def huggingface(pooler: str, **config: Any) -> dict[str, Any]:
    return {
        "context_length": CONTEXT_LENGTH, "vocab_size": 64, "hf_model_name": "dermray:wordpiece_tiny",
        "hf_tokenizer_name": "dermray:wordpiece_tiny", "hf_pooler_type": pooler, "hf_proj_type": "mlp",
        "hf_config": config,
    }  # fmt: skip


def clip(**text: Any) -> nn.Module:
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT | text)


def custom(**text: Any) -> nn.Module:
    return CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT | text)


def ours(text_cfg: dict[str, Any]) -> nn.Module:
    return towers.build({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text_cfg})


TRIMMED = {
    "clip": lambda: clip(),
    "clip, pooled at eos": lambda: clip(pool_type="eos"),
    "custom text": lambda: custom(proj_bias=True),
    "bert, mean": lambda: ours(huggingface("mean_pooler", **BERT)),
    "bert, class token": lambda: ours(huggingface("cls_pooler", **BERT)),
    "roberta, mean": lambda: ours(huggingface("mean_pooler", **ROBERTA)),
}
UNTOUCHED = {
    "sees its padding": lambda: custom(no_causal_mask=True),
    "pools at the last position": lambda: custom(pool_type="last"),
    "class token at the end": lambda: custom(embed_cls=True),
}


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().train()
    texts.accept_short(model)
    return model


def some_tokens(model: nn.Module, lengths: tuple[int, ...] = (3, 19, 7, 19)) -> Tensor:
    """Texts that end with EOS, then padding; with BERT's kind of padding where the tower has one."""
    pad = model.text.config.pad_token_id if hasattr(getattr(model, "text", None), "config") else 0
    tokens = torch.full((len(lengths), CONTEXT_LENGTH), pad)
    random = torch.Generator().manual_seed(1)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(2, EOS, (length - 1,), generator=random)
        row[length - 1] = EOS
    return tokens


def features_and_gradients(model: nn.Module, tokens: texts.Rows, index: Tensor | None = None) -> tuple[Tensor, Any]:
    model.zero_grad()
    features = texts.expanded(model.encode_text(tokens, normalize=True), index)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=features.dtype)
    (features * weights).sum().backward()
    return features.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-13, rtol=1e-12)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("kind", TRIMMED)
def test_trimming_changes_neither_features_nor_gradients(kind: str) -> None:
    model = made(TRIMMED[kind])
    tokens = some_tokens(model)
    short, index = texts.grouped(model, tokens, CPU)
    assert isinstance(short, Tensor)
    assert (short.shape, index) == ((4, 24), None), "the longest has 19 tokens, and another pass is not worth it"
    assert_same(features_and_gradients(model, short), features_and_gradients(model, tokens))
    for lengths, expected in (((3, CONTEXT_LENGTH), CONTEXT_LENGTH), ((8, 2), 8)):
        assert texts.grouped(model, some_tokens(model, lengths), CPU)[0].shape[1] == expected


@pytest.mark.parametrize("kind", TRIMMED)
def test_equal_texts_are_encoded_once_and_lengths_apart_with_the_gradient_of_all(kind: str) -> None:
    model = made(TRIMMED[kind])
    tokens = some_tokens(model, (38, 3, 19, 5, *[7] * 12, *[18] * 6))
    tokens = tokens[[*range(22), 3, 0, 0, 2]]
    rows, index = texts.grouped(model, tokens, CPU)
    assert isinstance(rows, list)
    assert index is not None
    assert [tuple(part.shape) for part in rows] == [(14, 8), (7, 24), (1, 40)]
    assert texts.num_positions(rows) == 14 * 8 + 7 * 24 + 40
    assert_same(features_and_gradients(model, rows, index), features_and_gradients(model, tokens))


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_a_tower_that_looks_at_padding_gets_all_of_it(kind: str) -> None:
    model = made(UNTOUCHED[kind])
    tokens = some_tokens(model)
    assert torch.equal(texts.grouped(model, tokens, CPU)[0], tokens)
    # It is right to leave them: shorter tokens would give other features.
    whole, short = model.encode_text(tokens), model.encode_text(tokens[:, :24])
    assert not torch.allclose(whole, short)


def test_a_model_that_was_not_prepared_gets_whole_texts() -> None:
    tokens = some_tokens(made(TRIMMED["clip"]))
    for model in (clip(), nn.Linear(2, 2)):
        assert torch.equal(texts.grouped(model, tokens, CPU)[0], tokens)
    assert len(texts.grouped(made(TRIMMED["clip"]), tokens[:0], CPU)[0]) == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 30))
def test_cuts_cost_least(lengths: list[int], pass_cost: int) -> None:
    lengths = sorted(lengths)

    def cost(ends: tuple[int, ...]) -> int:
        return sum((end - begin) * lengths[end - 1] + pass_cost for begin, end in pairwise((0, *ends)))

    everywhere = range(1, len(lengths))
    least = min(
        cost((*cuts, len(lengths))) for number in range(len(lengths)) for cuts in combinations(everywhere, number)
    )
    assert cost(tuple(texts._cuts(lengths, pass_cost))) == least


@pytest.mark.parametrize("make", [clip, custom])
def test_whole_texts_are_encoded_bit_for_bit_as_open_clip_does(make: Any) -> None:
    torch.manual_seed(0)
    published = make().eval()
    own = copy.deepcopy(published)
    texts.accept_short(own)
    tokens = some_tokens(published)
    assert torch.equal(own.encode_text(tokens), published.encode_text(tokens))
    assert own.state_dict().keys() == published.state_dict().keys()


@pytest.mark.parametrize("name", ["dermray_tiny", "panderm_tiny_bert"])
def test_models_by_name_take_short_texts(name: str) -> None:
    model, _, tokenizer = models.create(name)
    tokens = tokenizer(["a red scaly plaque on the forearm", "nevus"])
    short, _ = texts.grouped(model, tokens, CPU)
    assert short.shape[1] < tokens.shape[1]
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(short), model.encode_text(tokens), atol=1e-6, rtol=1e-5)


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=20))
def test_distinct_rows_come_in_order_and_give_back_all(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    distinct, index = texts.distinct(tokens)
    assert distinct.tolist() == list(map(list, dict.fromkeys(map(tuple, rows))))
    assert torch.equal(tokens, distinct if index is None else distinct[index])
    assert (index is None) == (len(distinct) == len(tokens))
