"""Which vectors do images and texts have? Images and texts ride in batches of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dermray.release.golden import question
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.verb import Pass, Verb

if TYPE_CHECKING:
    from dermray.service.engine.engine import Engine
    from dermray.vectors.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of a request, float32 `[I, D]` and `[T, D]`, L2-normalised; or the images that stopped it."""

    images: np.ndarray
    texts: np.ndarray
    timing: Timing
    rejections: tuple[Rejection, ...] = ()


async def embed(engine: Engine, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
    """Vectors of encoded images and of texts. Unusable images are reported, and nothing is embedded then."""
    ride = await engine.ride((OF_IMAGES, images), (OF_TEXTS, texts))
    of_images, of_texts = (_stacked(one, engine.model.embedding_dim) for one in (ride.of_images, ride.of_texts))
    return Embedded(of_images, of_texts, ride.timing, ride.rejections)


async def _probe(engine: Engine) -> Sequence[Rejection]:
    if "images" not in engine.model.answers:
        return ()
    image, text = question()
    return (await embed(engine, [image], [text] if "texts" in engine.model.answers else [])).rejections


def _of_images(encoder: Encoder, pixels: list[np.ndarray]) -> Iterable[np.ndarray]:
    return encoder.encode_pixels(np.stack(pixels))


def _of_texts(encoder: Encoder, texts: list[str]) -> Iterable[np.ndarray]:
    return encoder.encode_texts(texts)


def _fault(vector: np.ndarray) -> str | None:
    return None if np.isfinite(vector).all() else "the model gives vectors with NaN or infinite values"


def _stacked(vectors: Sequence[np.ndarray], dim: int) -> np.ndarray:
    return np.stack(vectors) if vectors else np.zeros((0, dim), dtype=np.float32)


OF_IMAGES = Pass("images", _of_images, _fault)
OF_TEXTS = Pass("texts", _of_texts, _fault)
# Images and texts ask different things of a model: who asks for either requires it himself.
EMBED = Verb(embed, probe=_probe)
