"""Features of the images and texts of an evaluation: computed once, kept in a store, shared by all tasks and runs.

The work itself is `dermray.vectors.embedding`: Ray Data over a pool of encoders, one Parquet part a row group, some
image files or a few hundred texts. Each text is encoded once however often it occurs. An image that is missing or
cannot be decoded costs one row: it is counted by reason and left out.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.samples import Samples
from dermray.progress import Say, busy
from dermray.vectors.embedding.pipeline import obtain
from dermray.vectors.embedding.store import Store, Vectors, default_uri, unit_length
from dermray.vectors.encoder_info import WITHOUT_TEXTS, EncoderInfo, Precision


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

    @classmethod
    def none(cls, samples: Samples, info: EncoderInfo) -> Features:
        """Of a run that encodes nothing, since its tasks and who predicts for them look at no vectors: no width."""
        return cls(
            info=info,
            images=np.zeros((len(samples), 0), dtype=np.float32),
            lengths=np.ones(len(samples), dtype=np.float32),
            reasons=np.full(len(samples), "", dtype=object),
            duration_s=0.0,
            num_encoded=0,
            num_actors=0,
            _texts=np.zeros((1, 0), dtype=np.float32),
            _text_rows={},
        )

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
        StorageError: the cache cannot be read or written, or the nodes do not share it.
        EvaluationError: the model takes no texts and some are given, its vectors are not finite, or no image could be
            encoded.
    """
    began = time.monotonic()
    distinct = list(dict.fromkeys(texts))
    with busy("loading the model", say):
        store = Store.of(cache or default_uri(), model_uri, precision=precision)
    if distinct and not store.info.context_length:
        raise EvaluationError(
            f"{WITHOUT_TEXTS.format(store.info.name)}, which some of the tasks ask for; give "
            "tasks=[linear_probe,knn,few_shot]"
        )
    obtained = obtain(
        [(samples.corpus_digest, samples.images) for samples in groups],
        distinct,
        store,
        model_uri=model_uri,
        batch_size=batch_size,
        precision=precision,
        num_actors=num_actors,
        say=say,
    )
    dim = store.info.embedding_dim
    together = Features(
        info=store.info,
        **_images(obtained.images, dim),
        duration_s=time.monotonic() - began,
        num_encoded=obtained.num_images_encoded,
        num_actors=obtained.num_actors,
        _texts=np.stack([*obtained.texts, np.zeros(dim, dtype=np.float32)]),
        _text_rows={text: row for row, text in enumerate(distinct)},
    )
    if not together.usable.any():
        raise EvaluationError(f"none of the {len(together.reasons)} images could be decoded: {together.failures}")
    starts = np.cumsum([0, *(len(samples) for samples in groups)])
    return [together.rows(int(start), int(stop)) for start, stop in itertools.pairwise(starts)]


def _images(parts: Sequence[Vectors], dim: int) -> dict[str, np.ndarray]:
    """Unit vectors, lengths and reasons of all images, in the order of the parts."""
    vectors = np.concatenate([np.zeros((0, dim), dtype=np.float32), *(part.values for part in parts)])
    units, lengths = unit_length(vectors)
    return {
        "images": units,
        "lengths": lengths,
        "reasons": np.concatenate([np.zeros(0, dtype=object), *(part.words for part in parts)]),
    }
