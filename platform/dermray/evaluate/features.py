"""Features of the images and texts of an evaluation: computed once, kept in a store, shared by all tasks and runs.

The work itself is `dermray.embedding`: Ray Data over a pool of encoders, one Parquet part a row group, some image files
or a few hundred texts. Each text is encoded once however often it occurs. An image that is missing or cannot be decoded
costs one row: it is counted by reason and left out.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dermray.embedding.pipeline import Work, encode
from dermray.embedding.store import TEXTS_PER_PART, Say, Store, Vectors, default_uri, key_of
from dermray.encoder import EncoderInfo, Precision
from dermray.errors import EvaluationError
from dermray.evaluate.samples import Samples

# As PyTorch's normalize has it.
SMALLEST_LENGTH = 1e-12


@dataclass(frozen=True)
class Features:
    """Unit vectors of the samples' images and of every text that a task asked for."""

    info: EncoderInfo
    # float32 `[N, D]`, rows of zeros where `usable` is False
    images: np.ndarray
    # length of each image's vector before it was made 1, float32 `[N]`
    lengths: np.ndarray
    # why an image has no vector, object `[N]`; empty where it has one
    reasons: np.ndarray
    # of everything that was encoded in the same go; images whose vectors were there already do not count
    duration_s: float
    num_encoded: int
    num_actors: int
    _texts: np.ndarray
    _text_rows: dict[str, int]

    @property
    def usable(self) -> np.ndarray:
        """Which images have a vector, bool `[N]`."""
        return self.reasons == ""

    @property
    def failures(self) -> dict[str, int]:
        """Images left out, by reason."""
        return dict(sorted(Counter(filter(None, self.reasons)).items()))

    def rows(self, start: int, stop: int) -> Features:
        """The same for the images from `start` up to `stop`; the texts are those of all."""
        kept = slice(start, stop)
        return replace(self, images=self.images[kept], lengths=self.lengths[kept], reasons=self.reasons[kept])

    def as_given(self) -> np.ndarray:
        """The images' vectors in the length that the tower gives them, float32 `[N, D]`."""
        return self.images * self.lengths[:, None]

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts that were asked for, float32 `[len(texts), D]`; equal texts give the same vector."""
        return self._texts[[self._text_rows[text] for text in texts]]


def compute(
    groups: Sequence[Samples],
    texts: Iterable[str],
    *,
    model_uri: str,
    cache: str | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    num_actors: int | None = None,
    say: Say = lambda line: None,
) -> list[Features]:
    """Vectors of the images of some samples and of texts: those that are kept are read, the others encoded in one go.

    Args:
        groups: whose images to encode: splits, data sets.
        texts: what else to encode; repeated ones are encoded once.
        model_uri: model folder that every node can read, or an open_clip name.
        cache: URI of the folder that keeps vectors, for every node to write; empty: `embedding.store.default_uri()`.
        batch_size: images or texts per forward pass.
        precision: of the towers.
        num_actors: encoders at work; empty: one per GPU, else one per two logical CPUs.
        say: takes a line of progress now and then.

    Returns:
        The features of each group, all with the same texts.

    Raises:
        ModelError: the model cannot be loaded, or its folder changes meanwhile.
        CorpusError: a shard cannot be read.
        StorageError: the cache cannot be read or written.
        EvaluationError: the model's vectors are not finite, no image could be encoded, or the nodes do not share the
            cache.
    """
    began = time.monotonic()
    distinct = list(dict.fromkeys(texts))
    store = Store.of(cache or default_uri(), model_uri, precision=precision)
    wanted = [
        Work(part, unit)
        for one in groups
        for part, unit in zip(store.images(one.corpus_digest, one.images), one.images, strict=True)
    ]
    contents = store.read([one.part for one in wanted], say)
    keys = [key_of(text) for text in distinct]
    known = store.read_texts(keys, say)
    unknown = [text for text, key in zip(distinct, keys, strict=True) if key not in known]
    lacking = [row for row, content in enumerate(contents) if content is None]
    # Two data sets may share images.
    work = [*{wanted[row].part.uri: wanted[row] for row in lacking}.values(), *_texts(store, unknown)]
    num_lacking = sum(wanted[row].num_rows for row in lacking)
    num_kept = sum(map(len, groups)) - num_lacking
    if num_kept or known:
        say(f"vectors of {num_kept:,} images and {len(known):,} texts are kept in {store.uri}")
    num_used = encode(
        work, store, model_uri=model_uri, batch_size=batch_size, precision=precision, num_actors=num_actors, say=say
    )
    for row, content in zip(lacking, store.read([wanted[row].part for row in lacking], say), strict=True):
        contents[row] = content
    known |= store.read_texts(set(keys) - known.keys(), say)
    if None in contents or len(known) < len(distinct):
        raise EvaluationError(
            f"vectors that were written below {store.uri} are not there: give a folder that all nodes share as cache="
        )
    together = Features(
        info=store.info,
        **_images(contents, store.info.embedding_dim),
        duration_s=time.monotonic() - began,
        num_encoded=num_lacking,
        num_actors=num_used,
        _texts=np.stack([known[key] for key in keys] or [np.zeros(store.info.embedding_dim, dtype=np.float32)]),
        _text_rows={text: row for row, text in enumerate(distinct)},
    )
    if not together.usable.any():
        raise EvaluationError(f"none of the {len(together.reasons)} images could be decoded: {together.failures}")
    starts = np.cumsum([0, *(len(samples) for samples in groups)])
    return [together.rows(int(start), int(stop)) for start, stop in itertools.pairwise(starts)]


def _texts(store: Store, texts: Sequence[str]) -> list[Work]:
    chunks = [tuple(texts[start : start + TEXTS_PER_PART]) for start in range(0, len(texts), TEXTS_PER_PART)]
    return [Work(store.texts([key_of(text) for text in chunk]), chunk) for chunk in chunks]


def _images(contents: Sequence[Vectors | None], dim: int) -> dict[str, np.ndarray]:
    """Unit vectors, lengths and reasons of all images, in the order of the parts."""
    present = [content for content in contents if content is not None]
    vectors = np.concatenate([np.zeros((0, dim), dtype=np.float32), *(content.values for content in present)])
    lengths = np.linalg.norm(vectors, axis=1)
    return {
        "images": vectors / np.maximum(lengths, SMALLEST_LENGTH)[:, None],
        "lengths": lengths,
        "reasons": np.concatenate([np.zeros(0, dtype=object), *(content.words for content in present)]),
    }
