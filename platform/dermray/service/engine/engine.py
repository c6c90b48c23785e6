"""One loaded model at work: decode a few batches ahead, one forward pass at a time. No Ray, no HTTP.

Images and texts have a batch queue and a thread each, so a long text batch does not hold up an image. An image that
cannot be decoded never reaches a batch, so it cannot fail its neighbours, and no text classifier is built for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dermray import images
from dermray.errors import ModelError
from dermray.evaluate.concept_terms import Prompts
from dermray.model_uri import folder_uri
from dermray.service.engine.backend import Annotated, Classified, Embedded, Predicted, Rejection, Timing
from dermray.service.engine.batching import Batcher, Ridden
from dermray.service.engine.decoding import DecodePool
from dermray.service.http.payload import check_cost
from dermray.service.refusals import Refusal
from dermray.service.settings import ServeConfig
from dermray.serving import (
    ClassifierCache,
    ModelSource,
    ServedModel,
    TooManyBuildsError,
    encode_concepts,
    rank,
    score_concepts,
)
from dermray.serving.gate import Check, Golden, examine, question, smoke
from dermray.serving.model import served_model

# Decoded images beside the batch that computes and the one that fills, in batches.
BATCHES_AHEAD = 4
# How long a health check waits for an answer to its own question before it says that there is none yet.
PATIENCE_S = 1.0
# Stands in a classifier's key before the templates of concepts, whose rows are other ones than those of classes.
_CONCEPTS = "published concept prompts"


@dataclass(slots=True)
class _Places:
    """So many requests at a time, and no more."""

    limit: int
    message: str
    num_held: int = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A place within the block.

        Raises:
            Refusal: 429 when all are taken.
        """
        if self.num_held >= self.limit:
            raise Refusal(429, self.message, code="queue_full", retry=True)
        self.num_held += 1
        try:
            yield
        finally:
            self.num_held -= 1


def max_ongoing(settings: ServeConfig) -> int:
    """Requests inside one encoder: more than one batch holds, so that the next batch fills during a forward pass."""
    return max(16, 2 * settings.max_batch_size)


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
        self._model = served_model(source, self._encoder)
        self._templates = tuple(TEMPLATES)
        self._limits = settings.limits
        self._requests = _Places(settings.limits.queued_requests, "too many requests are waiting for the model")
        # Half of them, so that vectors are made whatever class lists are asked for.
        self._unprepared = _Places(max_ongoing(settings) // 2, "too many requests are waiting for new class lists")
        self._answered_s = -math.inf
        self._probe: asyncio.Task[None] | None = None
        self._probe_began_s = 0.0
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
        self._predictions: Batcher[np.ndarray, dict[str, np.ndarray]] = Batcher(
            self._predict,
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
            ThreadPoolExecutor(1, thread_name_prefix="classifiers"),
            capacity=settings.classifier_cache,
            max_builds=settings.limits.pending_classifiers,
        )
        self._ask_itself()
        self._kept = contextlib.ExitStack()
        if source.classes and "texts" in self._encoder.answers:
            self._kept.enter_context(
                self._classifiers.asked(
                    self._model.digest, source.classes, self._templates, self._builder(self._templates)
                )
            )

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
        with self._requests.hold():
            return await self._embed(images, texts)

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """See `Backend.classify`."""
        is_own = templates is None and tuple(labels) == self._source.classes
        templates = tuple(templates or self._templates)
        if not is_own:
            check_cost(labels, templates, self._limits)
        with self._requests.hold():
            embedded = await self._embed([image], [])
            if embedded.rejections:
                return Classified((), embedded.timing, embedded.rejections[0])
            weights, timing = await self._table(labels, templates, self._builder(templates), embedded.timing)
        return Classified(tuple(rank(embedded.images[0], weights, labels, self._encoder.logit_scale)), timing)

    async def annotate(self, image: bytes, concepts: Sequence[str]) -> Annotated:
        """See `Backend.annotate`."""
        with self._requests.hold():
            embedded = await self._embed([image], [])
            if embedded.rejections:
                return Annotated((), embedded.timing, embedded.rejections[0])
            templates = (_CONCEPTS, *Prompts.load().templates)
            table, timing = await self._table(
                concepts, templates, lambda names: encode_concepts(self._encoder, names), embedded.timing
            )
        return Annotated(tuple(score_concepts(embedded.images[0], table, concepts)), timing)

    async def predict(self, image: bytes) -> Predicted:
        """See `Backend.predict`."""
        with self._requests.hold():
            return await self._predicted(image)

    async def check(self, within_s: float) -> None:
        """Probe, unless an image was answered within this time: under load that is proof enough.

        Raises:
            ModelError: as `probe`.
        """
        if time.monotonic() - self._answered_s > within_s:
            await self.probe()

    async def check_soon(self, within_s: float) -> None:
        """As `check`, but returns within a second or so: the answer may take as long as a request may.

        Raises:
            ModelError: as `probe`, or a question of ours is without an answer for longer than that.
        """
        if self._probe is None:
            if time.monotonic() - self._answered_s <= within_s:
                return
            self._probe, self._probe_began_s = asyncio.ensure_future(self.probe()), time.monotonic()
        await asyncio.wait({self._probe}, timeout=PATIENCE_S)
        if self._probe.done():
            ended, self._probe = self._probe, None
            ended.result()
        elif time.monotonic() - self._probe_began_s > self._limits.request_timeout_s:
            raise ModelError(f"the model has not answered for {self._limits.request_timeout_s:g} s")

    async def probe(self) -> None:
        """Send an image and a text of our own the way of every request, as far as the model answers.

        Raises:
            ModelError: the image is not decoded, or an answer is not finite.
        """
        image, text = question()
        rejections: list[Rejection] = []
        if "images" in self._model.answers:
            texts = [text] if "texts" in self._model.answers else []
            rejections += (await self._embed([image], texts)).rejections
        if "predictions" in self._model.answers:
            rejections += filter(None, [(await self._predicted(image)).rejection])
        if rejections:
            raise ModelError(f"the model gives no usable answer: {rejections[0].message}")

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
        vectors = Embedded(self._vectors(ridden[: len(images)]), self._vectors(ridden[len(images) :]), timing)
        if images:
            # A text has not been through the decoder.
            self._answered_s = time.monotonic()
        return vectors

    async def _predicted(self, image: bytes) -> Predicted:
        started_s = time.perf_counter()
        async with self._decoders.room.hold(1):
            entered_s = time.perf_counter()
            pixels, rejections = await self._decoders.decode([image])
            decode_s = time.perf_counter() - entered_s
            if rejections:
                return Predicted({}, Timing(decode_s=decode_s), rejections[0])
            ridden = await self._predictions.submit(pixels[0])
        odd = [name for name, values in ridden.result.items() if not np.isfinite(values).all()]
        if odd:
            raise ModelError(f"the model predicts {odd[0]} with NaN or infinite values: its weights are damaged")
        self._answered_s = time.monotonic()
        return Predicted(ridden.result, _timing(entered_s - started_s, decode_s, [ridden]))

    def _predict(self, pixels: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """What is predicted of each image of a batch."""
        found = self._encoder.predict_pixels(np.stack(pixels))
        return [{name: values[place] for name, values in found.items()} for place in range(len(pixels))]

    def _builder(self, templates: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
        from dermray.evaluate.zero_shot import build_classifier

        return lambda names: build_classifier(self._encoder, list(names), list(templates))

    async def _table(
        self,
        names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[Sequence[str]], np.ndarray],
        timing: Timing,
    ) -> tuple[np.ndarray, Timing]:
        """A cached table, and the timing with the wait for it. Whoever is cancelled here waits for it no more."""
        started_s = time.perf_counter()
        try:
            with contextlib.ExitStack() as stack:
                pending = stack.enter_context(self._classifiers.asked(self._model.digest, names, templates, build))
                if not pending.done():
                    stack.enter_context(self._unprepared.hold())
                # Shielded: others may be waiting for the same one.
                table = await asyncio.shield(asyncio.wrap_future(pending))
        except TooManyBuildsError as error:
            raise Refusal(429, str(error), code="queue_full", retry=True) from error
        waited_s = time.perf_counter() - started_s
        return table, Timing(timing.decode_s, timing.queue_s, timing.forward_s, waited_s, timing.batch_sizes)

    def _vectors(self, ridden: Sequence[Ridden[np.ndarray]]) -> np.ndarray:
        if not ridden:
            return np.zeros((0, self._model.embedding_dim), dtype=np.float32)
        vectors = np.stack([one.result for one in ridden])
        if not np.isfinite(vectors).all():
            raise ModelError("the model gives vectors with NaN or infinite values: its weights are damaged")
        return vectors

    def _ask_itself(self) -> None:
        check = smoke(self._encoder)
        if not check.passed:
            raise ModelError(f"the model gives no usable answer: {check.detail}")


def _timing(waited_s: float, decode_s: float, ridden: Sequence[Ridden[Any]]) -> Timing:
    return Timing(
        decode_s=decode_s,
        queue_s=waited_s + max((one.queue_s for one in ridden), default=0.0),
        forward_s=max((one.forward_s for one in ridden), default=0.0),
        batch_sizes=tuple(one.batch_size for one in ridden),
    )
