"""One loaded model at work: decode a few batches ahead, one forward pass at a time. No Ray, no HTTP.

Images and texts have a batch queue and a thread each, so a long text batch does not hold up an image. An image that
cannot be decoded never reaches a batch, so it cannot fail its neighbours, and no text classifier is built for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from dermray import images
from dermray.errors import ModelError
from dermray.model_uri import folder_uri
from dermray.predict import ClassifierCache, ModelSource, ServedModel, TooManyBuildsError
from dermray.predict.model import served_model
from dermray.release.golden import Check, Golden, examine, smoke
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.backend import VERBS, Backend
from dermray.service.engine.batching import Batched, Batcher
from dermray.service.engine.decoding import DecodePool
from dermray.service.engine.verb import Lane, Pass, Verb
from dermray.service.refusals import Refusal
from dermray.service.settings import ServeConfig

# Decoded images beside the batch that computes and the one that fills, in batches.
BATCHES_AHEAD = 4
# How long a health check waits for an answer to its own question before it says that there is none yet.
PATIENCE_S = 1.0


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


@dataclass(frozen=True, slots=True)
class Ride:
    """What became of the images and texts of one question, in order; or the images that stopped it."""

    of_images: Sequence[Any]
    of_texts: Sequence[Any]
    timing: Timing
    rejections: tuple[Rejection, ...] = ()


class Engine(Backend):
    """A `Backend` in this process: a thin shell around `Encoder` of pools, batches and timing, which verbs use."""

    def __init__(self, source: ModelSource, settings: ServeConfig) -> None:
        """Load the model; seconds.

        Raises:
            ModelError: it cannot be loaded, or its vectors are not finite.
        """
        # Here, and not above: the gateway imports this module and may need no torch.
        import torch

        from dermray.predict.zero_shot import TEMPLATES
        from dermray.vectors.encoder import Encoder

        # What Ray reserved for this process; replicas on one machine would otherwise all use every core.
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        images.use_one_core()
        self.encoder = Encoder.load(
            source.uri, device=settings.device, precision=settings.precision, compiled=settings.compile
        )
        self._source = source
        self._model = served_model(source, self.encoder)
        self.templates = tuple(TEMPLATES)
        self.limits = settings.limits
        self._requests = _Places(settings.limits.queued_requests, "too many requests are waiting for the model")
        # Half of them, so that vectors are made whatever class lists are asked for.
        self._unprepared = _Places(max_ongoing(settings) // 2, "too many requests are waiting for new class lists")
        self._answered_s = -math.inf
        self._probe: asyncio.Task[None] | None = None
        self._probe_began_s = 0.0
        self._decoders = DecodePool(
            self.encoder.preprocess,
            num_threads=settings.decode_threads,
            max_pixels=settings.limits.pixels,
            room=BATCHES_AHEAD * settings.max_batch_size,
        )
        self._lanes = {lane: ThreadPoolExecutor(1, thread_name_prefix=lane) for lane in get_args(Lane)}
        self._batches: dict[Pass[Any], Batcher[Any, Any]] = {}
        self._batch_size, self._batch_wait_s = settings.max_batch_size, settings.batch_wait_ms / 1000
        self._classifiers = ClassifierCache(
            ThreadPoolExecutor(1, thread_name_prefix="classifiers"),
            capacity=settings.classifier_cache,
            max_builds=settings.limits.pending_classifiers,
        )
        self._ask_itself()
        self._kept = contextlib.ExitStack()
        if source.classes and "texts" in self.encoder.answers:
            self._kept.enter_context(
                self._classifiers.asked(
                    self._model.digest, source.classes, self.templates, self.classifier_of(self.templates)
                )
            )

    @property
    def model(self) -> ServedModel:
        """See `Backend.model`."""
        return self._model

    def examine(self) -> list[Check]:
        """What the model shows before it is served; see `dermray.release.golden`. Blocks for a few passes."""
        folder = folder_uri(self._source.uri)
        return examine(self.encoder, Golden.load(folder) if folder is not None else None)

    async def ask(self, verb: Verb[Any, Any], *question: Any) -> Any:
        """See `Backend.ask`."""
        if verb.check is not None:
            verb.check(self, *question)
        with self._requests.hold():
            return await verb.answer(self, *question)

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
        elif time.monotonic() - self._probe_began_s > self.limits.request_timeout_s:
            raise ModelError(f"the model has not answered for {self.limits.request_timeout_s:g} s")

    async def probe(self) -> None:
        """Send an image and a text of our own the way of every request, as far as the model answers.

        Raises:
            ModelError: the image is not decoded, or an answer is not finite.
        """
        probes = [verb.probe for verb in VERBS.values() if verb.probe is not None]
        rejections = [rejection for probe in probes for rejection in await probe(self)]
        if rejections:
            raise ModelError(f"the model gives no usable answer: {rejections[0].message}")

    async def ride(
        self,
        images: tuple[Pass[Any], Sequence[bytes]],
        texts: tuple[Pass[Any], Sequence[str]] | None = None,
    ) -> Ride:
        """Decode images, and have the model do its passes over them and over texts, in batches with other questions.

        Args:
            images: what is computed of which encoded images.
            texts: and of which texts.

        Raises:
            ModelError: a result has a fault.
        """
        of_images, encoded = images
        of_texts, words = texts or (of_images, ())
        started_s = time.perf_counter()
        async with self._decoders.room.hold(len(encoded)):
            entered_s = time.perf_counter()
            pixels, rejections = await self._decoders.decode(encoded)
            decode_s = time.perf_counter() - entered_s if encoded else 0.0
            if rejections:
                return Ride((), (), Timing(decode_s=decode_s), tuple(rejections))
            batched = await asyncio.gather(
                *(self._batches_of(of_images).submit(one) for one in pixels),
                *(self._batches_of(of_texts).submit(one) for one in words),
            )
        timing = _timing(entered_s - started_s, decode_s, batched)
        found = [one.result for one in batched]
        ride = Ride(found[: len(encoded)], found[len(encoded) :], timing)
        _require_sound(ride.of_images, of_images)
        _require_sound(ride.of_texts, of_texts)
        if encoded:
            # A text has not been through the decoder.
            self._answered_s = time.monotonic()
        return ride

    def _batches_of(self, wanted: Pass[Any]) -> Batcher[Any, Any]:
        batches = self._batches.get(wanted)
        if batches is None:
            batches = self._batches[wanted] = Batcher(
                functools.partial(wanted.compute, self.encoder),
                self._lanes[wanted.lane],
                max_size=self._batch_size,
                max_wait_s=self._batch_wait_s,
            )
        return batches

    def classifier_of(self, templates: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
        """What makes a classifier, float32 `[D, C]`, of C classes by templates: a `build` of `table`. Seconds."""
        from dermray.predict.zero_shot import build_classifier

        return lambda names: build_classifier(self.encoder, list(names), list(templates))

    async def table(
        self,
        names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[Sequence[str]], np.ndarray],
        timing: Timing,
    ) -> tuple[np.ndarray, Timing]:
        """A table of texts, float32, kept by names and templates, and the timing with the wait for it.

        Whoever is cancelled here waits for it no more.

        Raises:
            Refusal: 429, too many tables are being built, or waited for.
        """
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

    def _ask_itself(self) -> None:
        check = smoke(self.encoder)
        if not check.passed:
            raise ModelError(f"the model gives no usable answer: {check.detail}")


def _require_sound(results: Sequence[Any], of: Pass[Any]) -> None:
    fault = next(filter(None, map(of.fault, results)), None)
    if fault is not None:
        raise ModelError(f"{fault}: its weights are damaged")


def _timing(waited_s: float, decode_s: float, batched: Sequence[Batched[Any]]) -> Timing:
    return Timing(
        decode_s=decode_s,
        queue_s=waited_s + max((one.queue_s for one in batched), default=0.0),
        forward_s=max((one.forward_s for one in batched), default=0.0),
        batch_sizes=tuple(one.batch_size for one in batched),
    )
