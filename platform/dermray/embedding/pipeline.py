"""Batch inference on the connected Ray cluster: what a store lacks is encoded, part by part.

An actor publishes each part as soon as it is whole, so whatever ends a run, at any instant, costs only the parts that
were in work; the next run goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.data

from dermray import cluster
from dermray.embedding.actor import EncodeActor, error_of
from dermray.embedding.store import TEXTS_PER_PART, Part, Say, Store, Vectors, key_of
from dermray.embedding.units import Images, to_document
from dermray.encoder import Precision
from dermray.errors import StorageError

PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class Work:
    """A part to be made, and what it is made of: images, or texts in the order of the part's keys."""

    part: Part
    source: Images | tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Images or texts in it."""
        return len(self.source) if isinstance(self.source, tuple) else self.source.num_rows

    def item(self) -> dict[str, str]:
        """As a row for `EncodeActor`."""
        what: dict[str, Any] = (
            {"texts": list(self.source)} if isinstance(self.source, tuple) else {"images": to_document(self.source)}
        )
        return {"item": json.dumps({"part": asdict(self.part), **what})}


@dataclass(frozen=True)
class Obtained:
    """Vectors of images, part by part, and of texts, in the order they were asked for; and what was done for them."""

    images: list[Vectors]
    texts: list[np.ndarray]
    num_images_encoded: int
    num_actors: int


def obtain(
    groups: Sequence[tuple[str, Sequence[Images]]],
    texts: Sequence[str],
    store: Store,
    *,
    model_uri: str,
    batch_size: int = 64,
    precision: Precision = "fp32",
    num_actors: int | None = None,
    say: Say = lambda line: None,
) -> Obtained:
    """What a store has of some images and texts, once what it lacks is encoded in one go.

    Args:
        groups: digest of a corpus or table, and its units of work.
        texts: distinct ones.
        store: of the model.
        model_uri, batch_size, precision, num_actors, say: as for `encode`.

    Raises:
        StorageError: the store cannot be read, or the nodes do not share it.
        DermRayError: as `encode`.
    """
    wanted = [
        Work(part, unit)
        for corpus_digest, units in groups
        for part, unit in zip(store.images(corpus_digest, units), units, strict=True)
    ]
    keys = [key_of(text) for text in texts]
    images, vectors = store.read([one.part for one in wanted], say), store.read_texts(keys, say)
    lacking = [row for row, content in enumerate(images) if content is None]
    num_lacking = sum(wanted[row].num_rows for row in lacking)
    num_kept = sum(one.num_rows for one in wanted) - num_lacking
    if num_kept or vectors:
        say(f"vectors of {num_kept:,} images and {len(vectors):,} texts are kept in {store.uri}")
    unknown = [text for text, key in zip(texts, keys, strict=True) if key not in vectors]
    # Two data sets may share images.
    work = [*{wanted[row].part.uri: wanted[row] for row in lacking}.values(), *_of_texts(store, unknown)]
    num_used = encode(
        work, store, model_uri=model_uri, batch_size=batch_size, precision=precision, num_actors=num_actors, say=say
    )
    for row, content in zip(lacking, store.read([wanted[row].part for row in lacking], say), strict=True):
        images[row] = content
    vectors |= store.read_texts(set(keys) - vectors.keys(), say)
    present = [content for content in images if content is not None]
    if len(present) < len(images) or len(vectors) < len(keys):
        raise StorageError(f"vectors written below {store.uri} are not there; give a place that all nodes share")
    return Obtained(present, [vectors[key] for key in keys], num_lacking, num_used)


def _of_texts(store: Store, texts: Sequence[str]) -> list[Work]:
    chunks = [tuple(texts[start : start + TEXTS_PER_PART]) for start in range(0, len(texts), TEXTS_PER_PART)]
    return [Work(store.texts([key_of(text) for text in chunk]), chunk) for chunk in chunks]


def encode(
    work: Sequence[Work],
    store: Store,
    *,
    model_uri: str,
    batch_size: int = 64,
    precision: Precision = "fp32",
    num_actors: int | None = None,
    say: Say = lambda line: None,
) -> int:
    """Make parts of a store.

    Args:
        work: the parts; those that are there are made again.
        store: of the model.
        model_uri: model folder that every node can read, or an open_clip name.
        batch_size: images or texts per forward pass; changes no vector by more than rounding.
        precision: of the towers.
        num_actors: encoders at work; empty: one per GPU, else one per two logical CPUs.
        say: takes a line of progress now and then.

    Returns:
        How many encoders were at work.

    Raises:
        ModelError: the model cannot be loaded, or its folder changed.
        CorpusError: a shard cannot be read.
        EvaluationError: the model's vectors are not finite.
        StorageError: a part cannot be written.
    """
    if not work:
        return 0
    store.describe()
    num_gpus = cluster.num_gpus()
    wanted = num_actors or int(num_gpus or max(1, cluster.num_cpus() // 2))
    pool_size = min(wanted, len(work))
    dataset = ray.data.from_items([one.item() for one in work], override_num_blocks=len(work)).map_batches(
        EncodeActor,
        fn_constructor_args=(model_uri, precision, batch_size, asdict(store.info)),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=pool_size),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )
    progress = _Progress.of(work)
    say(f"encoding {progress.num_images:,} images and {progress.num_texts:,} texts with {pool_size} encoder(s)")
    _drain(dataset, progress, say)
    return pool_size


@dataclass
class _Progress:
    """Rows done; the rate is taken from the first part on, so that the start of the actors does not blur it."""

    num_images: int
    num_texts: int
    images_done: int = 0
    texts_done: int = 0
    _first: tuple[float, int] | None = None

    @classmethod
    def of(cls, work: Sequence[Work]) -> _Progress:
        num_texts = sum(one.num_rows for one in work if isinstance(one.source, tuple))
        return cls(sum(one.num_rows for one in work) - num_texts, num_texts)

    def add(self, num_images: int, num_texts: int, now_s: float) -> None:
        """Count a finished part."""
        self.images_done += num_images
        self.texts_done += num_texts
        self._first = self._first or (now_s, self.images_done + self.texts_done)

    def line(self, now_s: float) -> str:
        """How far it is, how fast, and for how long still, if it goes on like this."""
        first_s, first_done = self._first or (now_s, 0)
        done = self.images_done + self.texts_done
        rate = (done - first_done) / max(now_s - first_s, 1e-9)
        left = f", {rate:.0f} a second, {(self.num_images + self.num_texts - done) / rate:.0f} s left" if rate else ""
        images = f"{self.images_done:,} of {self.num_images:,} images"
        return f"  {images} and {self.texts_done:,} of {self.num_texts:,} texts encoded{left}"


def _drain(dataset: ray.data.Dataset, progress: _Progress, say: Say) -> None:
    told = time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        for error in filter(None, batch["error"]):
            raise error_of(error)
        now = time.monotonic()
        progress.add(int(batch["num_images"].sum()), int(batch["num_texts"].sum()), now)
        if now - told >= PROGRESS_EVERY_S:
            told = now
            say(progress.line(now))
