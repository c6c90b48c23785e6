"""The encoder replica: decode in a bounded pool, batch, one forward pass at a time; and the handle on it.

Images and texts have a batch queue and a thread each, so a long text batch does not hold up an image. An image that
cannot be decoded never reaches a batch, so it cannot fail its neighbours.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from dermray import images
from dermray.errors import ImageError, ModelError
from dermray.serving import ClassifierCache, ModelSource, ServedModel, rank, served_model
from serve.backend import Classified, Embedded, Rejection, Timing
from serve.errors import Refusal, unavailable
from serve.settings import ServeConfig

# MPO is the JPEG of phones that store a second picture behind the first.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")
PROBE_TEXT = "a skin image"


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """One item's vector, and the pass that made it."""

    vector: np.ndarray
    batch_size: int
    forward_s: float
    queue_s: float = 0.0


class EncoderReplica:
    """One copy of the model. A thin shell around `Encoder`: pools, batches, timing."""

    def __init__(self, source: ModelSource, settings: ServeConfig) -> None:
        # Here, and not above: the driver and the gateway import this module and need no torch.
        import torch

        from dermray.encoder import Encoder
        from dermray.evaluate.zero_shot import TEMPLATES

        # What Ray reserved for this replica; replicas on one machine would otherwise all use every core.
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        self._encoder = Encoder.load(source.uri, device=settings.device, precision=settings.precision)
        self._model = served_model(source, self._encoder.info, self._encoder.logit_scale)
        self._templates = tuple(TEMPLATES)
        self._max_pixels = settings.limits.pixels
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._image_lane = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._text_lane = ThreadPoolExecutor(1, thread_name_prefix="texts")
        self._classifiers = ClassifierCache(
            ThreadPoolExecutor(1, thread_name_prefix="classifiers"), capacity=settings.classifier_cache
        )
        for batched in (self._forward_image, self._forward_text):
            batched.set_max_batch_size(settings.max_batch_size)
            batched.set_batch_wait_timeout_s(settings.batch_wait_ms / 1000)
        self._probe_encoder()
        if source.classes:
            self._classifier_of(source.classes, self._templates)

    def describe(self) -> ServedModel:
        """The identity of the loaded model."""
        return self._model

    async def embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        """See `Backend.embed`."""
        started_s = time.perf_counter()
        pixels, rejections = await self._decode(images)
        decode_s = time.perf_counter() - started_s if images else 0.0
        if rejections:
            nothing = np.zeros((0, self._model.embedding_dim), dtype=np.float32)
            return Embedded(nothing, nothing, Timing(decode_s=decode_s), tuple(rejections))
        forwarded = await asyncio.gather(
            *(self._timed(self._forward_image, one) for one in pixels),
            *(self._timed(self._forward_text, one) for one in texts),
        )
        return Embedded(
            self._vectors(forwarded[: len(images)]),
            self._vectors(forwarded[len(images) :]),
            _timing(decode_s, forwarded),
        )

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """See `Backend.classify`."""
        # Asked for first, so that it is built while the image is decoded and embedded.
        pending = self._classifier_of(labels, templates or self._templates)
        embedded = await self.embed([image], [])
        if embedded.rejections:
            return Classified((), embedded.timing, embedded.rejections[0])
        started_s = time.perf_counter()
        # Shielded: when this client goes away, others may be waiting for the same classifier.
        weights = await asyncio.shield(asyncio.wrap_future(pending))
        ranking = rank(embedded.images[0], weights, labels, self._model.logit_scale)
        timing = embedded.timing
        waited = Timing(
            timing.decode_s,
            timing.queue_s,
            timing.forward_s,
            time.perf_counter() - started_s,
            timing.batch_sizes,
        )
        return Classified(tuple(ranking), waited)

    async def probe(self) -> None:
        """Run an image and a text of our own through the model.

        Raises:
            ModelError: a vector is not finite.
        """
        await asyncio.get_running_loop().run_in_executor(self._image_lane, self._probe_encoder)

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises or hangs."""
        await self.probe()

    @serve.batch
    async def _forward_image(self, pixels: list[np.ndarray]) -> list[_Forwarded]:
        return await _forward(self._image_lane, lambda: self._encoder.encode_pixels(np.stack(pixels)))

    @serve.batch
    async def _forward_text(self, texts: list[str]) -> list[_Forwarded]:
        return await _forward(self._text_lane, lambda: self._encoder.encode_texts(texts))

    async def _timed(self, batched: Callable[[Any], Any], item: np.ndarray | str) -> _Forwarded:
        started_s = time.perf_counter()
        done: _Forwarded = await batched(item)
        waited_s = time.perf_counter() - started_s - done.forward_s
        return _Forwarded(done.vector, done.batch_size, done.forward_s, max(0.0, waited_s))

    async def _decode(self, images: Sequence[bytes]) -> tuple[list[np.ndarray], list[Rejection]]:
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._decoders, self._preprocess, data) for data in images]
        results = await asyncio.gather(*futures, return_exceptions=True)
        pixels: list[np.ndarray] = []
        rejections: list[Rejection] = []
        for index, result in enumerate(results):
            if isinstance(result, ImageError):
                rejections.append(Rejection(index, result.reason, str(result)))
            elif isinstance(result, BaseException):
                raise result
            else:
                pixels.append(result)
        return pixels, rejections

    def _preprocess(self, data: bytes) -> np.ndarray:
        kind, width, height = images.inspect(data)
        if kind not in IMAGE_FORMATS:
            raise ImageError("unsupported_format", f"{kind} images are not accepted; send JPEG, PNG or WebP")
        if width * height > self._max_pixels:
            raise ImageError(
                "too_many_pixels",
                f"the image has {width} x {height} pixels; the limit is {self._max_pixels / 1e6:g} million",
            )
        return self._encoder.preprocess(data)

    def _classifier_of(self, labels: Sequence[str], templates: Sequence[str]) -> Any:
        from dermray.evaluate.zero_shot import build_classifier

        return self._classifiers.submit(
            self._model.digest,
            labels,
            templates,
            lambda: build_classifier(self._encoder, list(labels), list(templates)),
        )

    def _vectors(self, forwarded: Sequence[_Forwarded]) -> np.ndarray:
        if not forwarded:
            return np.zeros((0, self._model.embedding_dim), dtype=np.float32)
        return _require_finite(np.stack([one.vector for one in forwarded]))

    def _probe_encoder(self) -> None:
        pixels = self._encoder.preprocess(_probe_image())
        _require_finite(self._encoder.encode_pixels(pixels[None]))
        _require_finite(self._encoder.encode_texts([PROBE_TEXT]))


class ReplicaBackend:
    """The `Backend` that asks encoder replicas through a Serve handle, and turns their faults into refusals."""

    def __init__(self, handle: DeploymentHandle, model: ServedModel) -> None:
        self._handle = handle
        self._model = model

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> ReplicaBackend:
        """Wait for a replica and learn what it serves."""
        return cls(handle, await handle.describe.remote())

    @property
    def model(self) -> ServedModel:
        """See `Backend.model`."""
        return self._model

    async def embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        """See `Backend.embed`."""
        return await self._ask("embed", images, texts)

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """See `Backend.classify`."""
        return await self._ask("classify", image, labels, templates)

    async def probe(self) -> None:
        """See `Backend.probe`."""
        await self._ask("probe")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except BackPressureError:
            message = "too many requests are waiting for the model"
            raise Refusal(429, message, code="queue_full", retry=True) from None
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            raise unavailable("the model is restarting") from None
        except RayTaskError as error:
            if isinstance(error.cause, ModelError):
                raise unavailable("the model gives no usable answer") from error
            raise


async def _forward(lane: ThreadPoolExecutor, encode: Callable[[], np.ndarray]) -> list[_Forwarded]:
    started_s = time.perf_counter()
    vectors = await asyncio.get_running_loop().run_in_executor(lane, encode)
    forward_s = time.perf_counter() - started_s
    return [_Forwarded(vector, len(vectors), forward_s) for vector in vectors]


def _timing(decode_s: float, forwarded: Sequence[_Forwarded]) -> Timing:
    return Timing(
        decode_s=decode_s,
        queue_s=max((one.queue_s for one in forwarded), default=0.0),
        forward_s=max((one.forward_s for one in forwarded), default=0.0),
        batch_sizes=tuple(one.batch_size for one in forwarded),
    )


def _require_finite(vectors: np.ndarray) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ModelError("the model gives vectors with NaN or infinite values: its weights are damaged")
    return vectors


def _probe_image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (205, 160, 140)).save(buffer, format="JPEG")
    return buffer.getvalue()
