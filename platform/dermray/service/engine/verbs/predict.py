"""What does a model whose kind predicts say of an image by itself?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class Predicted:
    """What a model says of one image by itself: float32 arrays by name; or why the image was rejected."""

    values: Mapping[str, np.ndarray]
    timing: Timing
    rejection: Rejection | None = None


async def predict(engine: Engine, image: bytes) -> Predicted:
    """What a model whose kind predicts says of one encoded image."""
    ride = await engine.ride((OF_IMAGES, [image]))
    if ride.rejections:
        return Predicted({}, ride.timing, ride.rejections[0])
    return Predicted(ride.of_images[0], ride.timing)


async def _probe(engine: Engine) -> Sequence[Rejection]:
    if "predictions" not in engine.model.answers:
        return ()
    rejection = (await predict(engine, question()[0])).rejection
    return () if rejection is None else (rejection,)


def _of_images(encoder: Encoder, pixels: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """`{"grade": [[0.1, 0.9], [0.8, 0.2]]}` of two images → one such dictionary each, without the first axis."""
    found = encoder.predict_pixels(np.stack(pixels))
    return [{name: values[place] for name, values in found.items()} for place in range(len(pixels))]


def _fault(values: Mapping[str, np.ndarray]) -> str | None:
    odd = [name for name, one in values.items() if not np.isfinite(one).all()]
    return f"the model predicts {odd[0]} with NaN or infinite values" if odd else None


OF_IMAGES = Pass("images", _of_images, _fault)
PREDICT = Verb(predict, needs=("predictions",), probe=_probe)
