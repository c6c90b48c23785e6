"""One loaded model at work: decode a few batches ahead, one forward pass at a time. No Ray, no HTTP.

Images and texts have a batch queue and a thread each, so a long text batch does not hold up an image. An image that
cannot be decoded never reaches a batch, so it cannot fail its neighbours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dermray import images
from dermray.errors import ModelError
from dermray.model_uri import folder_uri
from dermray.serving import ClassifierCache, ModelSource, ServedModel, encode_concepts, rank, score_concepts
from dermray.serving.gate import Check, Golden, examine, smoke
from dermray.serving.model import served_model
from serve.backend import Annotated, Classified, Embedded, Timing
from serve.batching import Batcher, Ridden
from serve.decoding import DecodePool
from serve.errors import Refusal
from serve.settings import ServeConfig

# Decoded images beside the batch that computes and the one that fills, in batches.
BATCHES_AHEAD = 4
# Stands in a classifier's key where the prompt templates do.
_CONCEPT_PROMPTS = ("published concept prompts",)


class Engine:
    """A `Backend` in this process: a thin shell around `Encoder` of pools, batches and timing."""

    def __init__(self, source: ModelSource, settings: ServeConfig) -> None:
        """Load the model; seconds.

        Raises:
            ModelError: it cannot be loaded, or its vectors are not finite.
        """
        # Here, and not above: the gateway imports this module and may need no torch.
        import torch

        from dermray.encoder import Encoder
        from dermray.evaluate.zero_shot import TEMPLATES

        # What Ray reserved for this process; replicas on one machine would otherwise all use every core.
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        images.use_one_core()
        self._encoder = Encoder.load(
            source.uri, device=settings.device, precision=settings.precision, compiled=settings.compile
        )
        self._source = source
        self._model = served_model(source, self._encoder.info, self._encoder.logit_scale)
        self._templates = tuple(TEMPLATES)
        self._limits = settings.limits
        self._num_pending = 0
        self._answered_s = 0.0
        self._decoders = DecodePool(
            self._encoder.preprocess,
            num_threads=settings.decode_threads,
            max_pixels=settings.limits.pixels,
            room=BATCHES_AHEAD * settings.max_batch_size,
        )
        self._image_lane = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._text_lane = ThreadPoolExecutor(1, thread_name_prefix="texts")
        wait_s = settings.batch_wait_ms / 1000
        self._image_batches: Batcher[np.ndarray, np.ndarray] = Batcher(
            lambda pixels: self._encoder.encode_pixels(np.stack(pixels)),
            self._image_lane,
            max_size=settings.max_batch_size,
            max_wait_s=wait_s,
        )
        self._text_batches: Batcher[str, np.ndarray] = Batcher(
            self._encoder.encode_texts,
            self._text_lane,
            max_size=settings.max_batch_size,
            max_wait_s=wait_s,
        )
        self._classifiers = ClassifierCache(
            ThreadPoolExecutor(1, thread_name_prefix="classifiers"), capacity=settings.classifier_cache
        )
        self._ask_itself()
        if source.classes:
            self._classifier_of(source.classes, self._templates)

    @property
    def model(self) -> ServedModel:
        """See `Backend.model`."""
        return self._model

    def examine(self) -> list[Check]:
        """What the model shows before it is served; see `dermray.serving.gate`. Blocks for a few passes."""
        folder = folder_uri(self._source.uri)
        return examine(self._encoder, Golden.load(folder) if folder is not None else None)

    async def embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        """See `Backend.embed`."""
        self._admit()
        try:
            return await self._embed(images, texts)
        finally:
            self._num_pending -= 1

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """See `Backend.classify`."""
        # Asked for first, so that it is built while the image is decoded and embedded.
        pending = self._classifier_of(labels, templates or self._templates)
        embedded = await self.embed([image], [])
        if embedded.rejections:
            return Classified((), embedded.timing, embedded.rejections[0])
        weights, timing = await _wait_for(pending, embedded.timing)
        return Classified(tuple(rank(embedded.images[0], weights, labels, self._model.logit_scale)), timing)

    async def annotate(self, image: bytes, concepts: Sequence[str]) -> Annotated:
        """See `Backend.annotate`."""
        pending = self._classifiers.submit(
            self._model.digest, concepts, _CONCEPT_PROMPTS, lambda: encode_concepts(self._encoder, concepts)
        )
        embedded = await self.embed([image], [])
        if embedded.rejections:
            return Annotated((), embedded.timing, embedded.rejections[0])
        table, timing = await _wait_for(pending, embedded.timing)
        return Annotated(tuple(score_concepts(embedded.images[0], table, concepts)), timing)

    async def check(self, within_s: float) -> None:
        """Probe, unless a request was answered within this time: under load that is proof enough.

        Raises:
            ModelError: as `probe`.
        """
        if time.monotonic() - self._answered_s > within_s:
            await self.probe()

    async def probe(self) -> None:
        """Run an image and a text of our own through the model.

        Raises:
            ModelError: a vector is not finite.
        """
        await asyncio.get_running_loop().run_in_executor(self._image_lane, self._ask_itself)

    def _admit(self) -> None:
        if self._num_pending >= self._limits.queued_requests:
            message = "too many requests are waiting for the model"
            raise Refusal(429, message, code="queue_full", retry=True)
        self._num_pending += 1

    async def _embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        started_s = time.perf_counter()
        async with self._decoders.room.hold(len(images)):
            entered_s = time.perf_counter()
            pixels, rejections = await self._decoders.decode(images)
            decode_s = time.perf_counter() - entered_s if images else 0.0
            if rejections:
                nothing = np.zeros((0, self._model.embedding_dim), dtype=np.float32)
                return Embedded(nothing, nothing, Timing(decode_s=decode_s), tuple(rejections))
            ridden = await asyncio.gather(
                *(self._image_batches.submit(one) for one in pixels),
                *(self._text_batches.submit(one) for one in texts),
            )
        timing = _timing(entered_s - started_s, decode_s, ridden)
        return Embedded(self._vectors(ridden[: len(images)]), self._vectors(ridden[len(images) :]), timing)

    def _classifier_of(self, labels: Sequence[str], templates: Sequence[str]) -> Future[np.ndarray]:
        from dermray.evaluate.zero_shot import build_classifier

        return self._classifiers.submit(
            self._model.digest,
            labels,
            templates,
            lambda: build_classifier(self._encoder, list(labels), list(templates)),
        )

    def _vectors(self, ridden: Sequence[Ridden[np.ndarray]]) -> np.ndarray:
        if not ridden:
            return np.zeros((0, self._model.embedding_dim), dtype=np.float32)
        vectors = np.stack([one.result for one in ridden])
        if not np.isfinite(vectors).all():
            raise ModelError("the model gives vectors with NaN or infinite values: its weights are damaged")
        self._answered_s = time.monotonic()
        return vectors

    def _ask_itself(self) -> None:
        check = smoke(self._encoder)
        if not check.passed:
            raise ModelError(f"the model gives no usable answer: {check.detail}")
        self._answered_s = time.monotonic()


async def _wait_for(pending: Future[np.ndarray], timing: Timing) -> tuple[np.ndarray, Timing]:
    """A cached table, and the timing with the wait for it."""
    started_s = time.perf_counter()
    # Shielded: when this client goes away, others may be waiting for the same one.
    table = await asyncio.shield(asyncio.wrap_future(pending))
    waited_s = time.perf_counter() - started_s
    return table, Timing(timing.decode_s, timing.queue_s, timing.forward_s, waited_s, timing.batch_sizes)


def _timing(waited_s: float, decode_s: float, ridden: Sequence[Ridden[np.ndarray]]) -> Timing:
    return Timing(
        decode_s=decode_s,
        queue_s=waited_s + max((one.queue_s for one in ridden), default=0.0),
        forward_s=max((one.forward_s for one in ridden), default=0.0),
        batch_sizes=tuple(one.batch_size for one in ridden),
    )
