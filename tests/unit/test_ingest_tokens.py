"""Tokenisers taken apart for the decoding tasks give what the originals give, for any text."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray import models
from dermray.ingest import tokens

WORDS = st.sampled_from(
    [
        *("scaly", "plaque", "it's", "&amp;", "&lt;b&gt;", "3.5cm", "<end_of_text>"),
        *("!!<START_OF_TEXT>", "_", "'ll", "[SEP]"),
        *("Sj\u00f6gren\u2019s", "\u76ae\u819a", "\u00e9", "e\u0301", "\u017f", "\u0130", "\ufb01x", "\U0001f642"),
        *("\u00ef\u00bb\u00bf", "\u00e2\u20ac\u2122", "\x00", "\x1b[31m", "\u00a0", "\r\n"),
    ]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=12), max_size=60).map(" ".join) | st.text(max_size=80)
FACTORIES = {
    "clip": (functools.partial(models.tokenizer, "ViT-B-32"), tokens.ClipTokens),
    "bert": (functools.partial(models.tokenizer, "panderm_tiny_bert"), tokens.FastTokens),
}


@functools.cache
def taken_apart(name: str) -> tokens.TextEncoder:
    made = tokens.portable(FACTORIES[name][0])
    assert isinstance(made, FACTORIES[name][1])
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("name", FACTORIES)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=150)
def test_equal_to_the_original_for_any_text(name: str, texts: list[str]) -> None:
    got = taken_apart(name)(texts)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, FACTORIES[name][0]()(texts).numpy())


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_WORDS", 3)
    made = tokens.portable(FACTORIES["clip"][0])
    text = "one two three four five six one two"
    np.testing.assert_array_equal(made([text]), FACTORIES["clip"][0]()([text]).numpy())


def test_an_unknown_tokeniser_goes_as_it_came() -> None:
    made = tokens.portable(lambda: lambda texts: torch.tensor([[len(text)] for text in texts]))
    assert isinstance(made, tokens.AsGiven)
    np.testing.assert_array_equal(made(["abc", ""]), [[3], [0]])
