"""A model made of rules for tests of evaluation tasks: vectors that know the condition and the colour of everything."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from dermray.evaluate.features import Features
from dermray.evaluate.samples import Samples
from dermray.vectors.encoder_info import EncoderInfo

INFO = EncoderInfo("tiny", 32, 32, 24, "a" * 64, "b" * 64, 1000)
WORDS = ("eczema", "dermatitis", "psoriasis", "melanoma", "nevus", "red", "pink", "black", "brown", "yellow")
AXES = {word: axis for axis, word in enumerate(WORDS)} | {"dermatitis": 0}


def vector(text: str, *, noise: float = 0.3) -> np.ndarray:
    """A unit vector along the axes of the words that a text holds, with noise that only depends on the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    found = np.random.default_rng(seed).normal(0, noise / np.sqrt(32), 32)
    for word, axis in AXES.items():
        if word in text:
            found[axis] += 1.0
    return (found / np.linalg.norm(found)).astype(np.float32)


def features_of(samples: Samples, texts: Sequence[str], *, broken: Collection[int] = ()) -> Features:
    """What such a model makes of the samples (by their labels and concepts) and of texts."""
    said = [" ".join([*labels, *concepts, name]) for labels, concepts, name in _said(samples)]
    usable = np.array([row not in broken for row in range(len(samples))])
    distinct = list(dict.fromkeys(texts))
    return Features(
        info=INFO,
        images=np.stack([vector(text) for text in said]) * usable[:, None].astype(np.float32),
        lengths=np.ones(len(samples), dtype=np.float32),
        reasons=np.array(["not_an_image" if row in broken else "" for row in range(len(samples))], dtype=object),
        duration_s=1.0,
        num_encoded=len(samples),
        num_actors=1,
        _texts=np.stack([vector(text) for text in distinct] or [np.zeros(32, np.float32)]),
        _text_rows={text: row for row, text in enumerate(distinct)},
    )


def _said(samples: Samples) -> zip:
    return zip(samples.labels, samples.concepts, samples.ids, strict=True)
