"""Features of images and texts, computed once by Ray Data over a pool of encoder actors and shared by all tasks.

The unit of work is one Parquet row group, some image files, or a few hundred texts; each text is encoded once however
often it occurs. An image that is missing or cannot be decoded costs one row: it is counted by reason and left out.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray.data

from dermray import cluster, errors
from dermray.encoder import Encoder, EncoderInfo, Precision
from dermray.errors import DermRayError, EvaluationError, ImageError
from dermray.evaluate.samples import Images, Samples, from_document, to_document

TEXTS_PER_ITEM = 512
PROGRESS_EVERY_S = 5.0
MISSING = "missing"
# As PyTorch's normalize has it.
SMALLEST_LENGTH = 1e-12

Say = Callable[[str], None]
Batch = dict[str, np.ndarray]


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
    # of everything that was encoded in the same go
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


class EncodeActor:
    """A Ray Data actor around `Encoder`: one item of work in, one row a vector out.

    An error of ours travels as a row: Ray keeps only the text of an exception, and restarts an actor whose
    constructor raises, however hopeless.
    """

    def __init__(self, model_uri: str, precision: Precision, batch_size: int) -> None:
        """Remember the model; it is loaded with the first item. `batch_size` images or texts go through at a time."""
        self._load = lambda: Encoder.load(model_uri, precision=precision)
        self._encoder: Encoder | None = None
        self._batch_size = batch_size

    def __call__(self, batch: Batch) -> Batch:
        """One item (a batch of one row) to its rows: kind, position, vector, failure, the encoder's info, error."""
        item = json.loads(str(batch["item"][0]))
        try:
            self._encoder = self._encoder or self._load()
            vectors, failures = self._encode(self._encoder, item)
        except DermRayError as error:
            return _rows(item, np.zeros((1, 1), dtype=np.float32), [""], error=_to_json(error))
        return _rows(item, vectors, failures, info=json.dumps(asdict(self._encoder.info)))

    def _encode(self, encoder: Encoder, item: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
        if "texts" in item:
            vectors = encoder.encode_texts(item["texts"], batch_size=self._batch_size)
            return vectors, [""] * len(vectors)
        return self._encode_images(encoder, from_document(item["images"]))

    def _encode_images(self, encoder: Encoder, unit: Images) -> tuple[np.ndarray, list[str]]:
        images = unit.read()
        vectors = np.zeros((len(images), encoder.info.embedding_dim), dtype=np.float32)
        failures = [""] * len(images)
        for start in range(0, len(images), self._batch_size):
            rows, pixels = [], []
            for row, data in enumerate(images[start : start + self._batch_size], start):
                if data is None:
                    failures[row] = MISSING
                    continue
                try:
                    pixels.append(encoder.preprocess(data))
                    rows.append(row)
                except ImageError as error:
                    failures[row] = error.reason
            if rows:
                vectors[rows] = encoder.encode_pixels(np.stack(pixels), normalise=False)
        return vectors, failures


def compute(
    groups: Sequence[Samples],
    texts: Iterable[str],
    *,
    model_uri: str,
    batch_size: int = 64,
    precision: Precision = "fp32",
    num_actors: int | None = None,
    say: Say = lambda line: None,
) -> list[Features]:
    """Encode the images of some samples and the texts in one go on the connected Ray cluster.

    Args:
        groups: whose images to encode: splits, data sets.
        texts: what else to encode; repeated ones are encoded once.
        model_uri: model folder that every node can read, or an open_clip name.
        batch_size: images or texts per forward pass.
        precision: of the towers.
        num_actors: encoders at work; empty: one per GPU, else one per two logical CPUs.
        say: takes a line of progress now and then.

    Returns:
        The features of each group, all with the same texts.

    Raises:
        ModelError: the model cannot be loaded.
        CorpusError: a shard cannot be read.
        EvaluationError: the model's vectors are not finite, or no image could be encoded.
    """
    began = time.monotonic()
    distinct = list(dict.fromkeys(texts))
    num_images = sum(len(samples) for samples in groups)
    items = list(_items(groups, distinct))
    num_gpus = cluster.num_gpus()
    wanted = num_actors or int(num_gpus or max(1, cluster.num_cpus() // 2))
    pool_size = min(wanted, len(items))
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        EncodeActor,
        fn_constructor_args=(model_uri, precision, batch_size),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=pool_size),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )
    say(f"encoding {num_images:,} images and {len(distinct):,} texts with {pool_size} encoder(s)")
    collected = _Collected(num_images, len(distinct))
    _drain(dataset, collected, say)
    together = collected.features(distinct, time.monotonic() - began, pool_size)
    if not together.usable.any():
        raise EvaluationError(f"none of the {num_images} images could be decoded: {together.failures}")
    starts = np.cumsum([0, *(len(samples) for samples in groups)])
    return [together.rows(int(start), int(stop)) for start, stop in itertools.pairwise(starts)]


class _Collected:
    """Arrays that rows from any actor, in any order, are put into."""

    def __init__(self, num_images: int, num_texts: int) -> None:
        self._sizes = {False: num_images, True: num_texts}
        self._vectors: dict[bool, np.ndarray] = {}
        self._reasons = np.full(num_images, "", dtype=object)
        self._infos: set[str] = set()
        self.num_images_done = 0

    def add(self, batch: Batch) -> None:
        """Put the rows of one batch in their places.

        Raises:
            DermRayError: what went wrong in an actor, or vectors that are not finite.
        """
        for error in filter(None, batch["error"]):
            raise _from_json(error)
        vectors = np.stack(list(batch["vector"]))
        if not np.isfinite(vectors).all():
            raise EvaluationError("the model gives vectors that are not finite; its weights are damaged or diverged")
        self._infos.update(info for info in batch["info"] if info)
        for is_text in (False, True):
            rows = batch["is_text"] == is_text
            if not rows.any():
                continue
            if is_text not in self._vectors:
                self._vectors[is_text] = np.zeros((self._sizes[is_text], vectors.shape[1]), dtype=np.float32)
            self._vectors[is_text][batch["position"][rows]] = vectors[rows]
        images = ~batch["is_text"]
        self._reasons[batch["position"][images]] = batch["failure"][images]
        self.num_images_done += int(images.sum())

    def features(self, texts: list[str], duration_s: float, num_actors: int) -> Features:
        """What was collected, checked to be of one model."""
        if len(self._infos) != 1:
            raise EvaluationError("the model's folder changed while it was evaluated; run the evaluation again")
        info = EncoderInfo(**json.loads(self._infos.pop()))
        vectors = self._vectors.get(False, np.zeros((0, info.embedding_dim), dtype=np.float32))
        lengths = np.linalg.norm(vectors, axis=1)
        return Features(
            info=info,
            images=vectors / np.maximum(lengths, SMALLEST_LENGTH)[:, None],
            lengths=lengths,
            reasons=self._reasons,
            duration_s=duration_s,
            num_encoded=len(vectors),
            num_actors=num_actors,
            _texts=self._vectors.get(True, np.zeros((0, info.embedding_dim), dtype=np.float32)),
            _text_rows={text: row for row, text in enumerate(texts)},
        )


def _drain(dataset: ray.data.Dataset, collected: _Collected, say: Say) -> None:
    began = told = time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        collected.add(batch)
        now = time.monotonic()
        if now - told >= PROGRESS_EVERY_S:
            told = now
            rate = collected.num_images_done / (now - began)
            say(f"  {collected.num_images_done:,} images encoded, {rate:.0f} a second")


def _rows(item: dict[str, Any], vectors: np.ndarray, failures: list[str], **once: str) -> Batch:
    """Rows of one item; what is said `once` stands in its first row."""
    num_rows = len(vectors)
    return {
        "is_text": np.full(num_rows, "texts" in item),
        "position": item["position"] + np.arange(num_rows, dtype=np.int64),
        "vector": vectors,
        "failure": np.array(failures, dtype=object),
        **{name: np.array([once.get(name, "")] + [""] * (num_rows - 1), dtype=object) for name in ("info", "error")},
    }


def _to_json(error: DermRayError) -> str:
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def _from_json(text: str) -> DermRayError:
    document = json.loads(text)
    return getattr(errors, document["kind"])(document["message"])


def _items(groups: Sequence[Samples], texts: list[str]) -> Iterator[dict[str, Any]]:
    start = 0
    for samples in groups:
        for unit in samples.images:
            yield {"item": json.dumps({"position": start + unit.position, "images": to_document(unit)})}
        start += len(samples)
    for start in range(0, len(texts), TEXTS_PER_ITEM):
        yield {"item": json.dumps({"position": start, "texts": texts[start : start + TEXTS_PER_ITEM]})}
