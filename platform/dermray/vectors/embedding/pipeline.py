"""Batch inference on the connected Ray cluster: what a store lacks is encoded, part by part.

An actor publishes each part as soon as it is whole, so whatever ends a run, at any instant, costs only the parts that
were in work; the next run goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermray import cluster, interrupts, pieces
from dermray.errors import StorageError
from dermray.progress import Progress, Say
from dermray.vectors.embedding.actor import EncodeActor, Work
from dermray.vectors.embedding.store import TEXTS_PER_PART, Store, Vectors, key_of
from dermray.vectors.embedding.units import Images
from dermray.vectors.encoder_info import Precision


@dataclass(frozen=True)
class ObtainedVectors:
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
) -> ObtainedVectors:
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
    work = {one.part.uri: one for one in [*(wanted[row] for row in lacking), *_of_texts(store, unknown)]}
    num_used = encode(
        list(work.values()),
        store,
        model_uri=model_uri,
        batch_size=batch_size,
        precision=precision,
        num_actors=num_actors,
        say=say,
    )
    made = _read_back(list(work.values()), store, say)
    for one, content in zip(work.values(), made.values(), strict=True):
        if isinstance(one.source, tuple):
            vectors.update(zip(content.words, content.values, strict=True))
    present = [content or made[one.part.uri] for one, content in zip(wanted, images, strict=True)]
    return ObtainedVectors(present, [vectors[key] for key in keys], num_lacking, num_used)


def _read_back(work: Sequence[Work], store: Store, say: Say) -> dict[str, Vectors]:
    """The parts that were just made, by their names: a store may list them later."""
    made: dict[str, Vectors] = {}
    for one, content in zip(work, store.read([one.part for one in work], say), strict=True):
        if content is None:
            raise StorageError(f"{one.part.uri} was written and is not there; give a place that all nodes share")
        made[one.part.uri] = content
    return made


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
        StoppedError: it was interrupted.
    """
    if not work:
        return 0
    store.describe()
    pool = pieces.Pool.of_models(
        "encoder",
        num_actors,
        noun="part",
        operator="EncodeActor",
        kept=f"finished vectors are kept in {store.uri}: the same command again goes on",
    )
    pool_size = pool.num_workers(len(work))
    num_texts = sum(one.num_rows for one in work if isinstance(one.source, tuple))
    num_images = sum(one.num_rows for one in work) - num_texts
    say(f"encoding {num_images:,} images and {num_texts:,} texts with {pool_size} encoder(s)")
    waits_for = cluster.waiting(f"vectors of {cluster.in_words('encoder', pool.needs, count=pool_size)}")
    counted = Progress("encode", num_images + num_texts, "images and texts", waits_for=waits_for, say=say)
    encoder = EncodeActor(model_uri, precision, batch_size, store.info)
    wanted = {one.part.uri: one for one in work}
    with interrupts.telling(lambda: pool.kept), counted as progress:
        for uri, _ in pieces.run(wanted, encoder, pool, say=say):
            progress.advance(wanted[uri].num_rows)
    return pool_size
