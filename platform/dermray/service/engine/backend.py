"""What the routes need of a model, whoever provides it: the protocol, its questions and its answers.

Providers are an engine in this process (`engine.engine.Engine`) and a handle on encoder replicas
(`fleet.replica.ReplicaBackend`); contract tests use one that needs no weights. Nothing here knows of HTTP, Ray or
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dermray.serving import ConceptScore, RankedClass, ServedModel


@dataclass(frozen=True, slots=True)
class Rejection:
    """One image that cannot be used: its position in the request, `ImageError`'s reason and message."""

    index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went: the longest of its items at each stage, and the batches its items rode in."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0
    classifier_s: float = 0.0
    batch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of a request, float32 `[I, D]` and `[T, D]`, L2-normalised; or the images that stopped it."""

    images: np.ndarray
    texts: np.ndarray
    timing: Timing
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True, slots=True)
class Classified:
    """The ranking of one image, most probable class first; or why the image was rejected."""

    ranking: tuple[RankedClass, ...]
    timing: Timing
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class Annotated:
    """The concepts of one image, surest first; or why the image was rejected."""

    concepts: tuple[ConceptScore, ...]
    timing: Timing
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a model says of one image by itself: float32 arrays by name; or why the image was rejected."""

    values: Mapping[str, np.ndarray]
    timing: Timing
    rejection: Rejection | None = None


class Backend(Protocol):
    """A served model; routes ask only what is in `model.answers`.

    Every method may raise `Refusal` (429, 503) when it cannot answer now.
    """

    @property
    def model(self) -> ServedModel:
        """The identity that every answer carries."""

    async def embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        """Vectors of encoded images and of texts. Unusable images are reported, and nothing is embedded then."""

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """Rank `labels` for one encoded image by the text classifier that `templates` make of them.

        Without templates the published ones are used.
        """

    async def annotate(self, image: bytes, concepts: Sequence[str]) -> Annotated:
        """Presence of concepts, all of which have published terms, in one encoded image."""

    async def predict(self, image: bytes) -> Predicted:
        """What a model whose kind predicts says of one encoded image."""

    async def probe(self) -> None:
        """Return when the model has just answered a question of our own; raise otherwise."""
