"""What a model must show before it is served: golden answers reproduced, and sane answers to smoke requests.

Golden answers are what the model gave for a few inputs where it was made (`golden.json` in its folder): vectors of
images, vectors of texts and predictions, as far as its kind gives them. They are compared where the preprocessing is
equal, so that another device, precision or library that moves them is seen before a client sees it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dermray import storage
from dermray.errors import ModelError

if TYPE_CHECKING:
    from dermray.vectors.encoder import Encoder

GOLDEN_NAME = "golden.json"
MIN_GOLDEN_COSINE = 0.999
MIN_REPEATED_COSINE = 0.9999
# Of predictions, as a share of the length of what they should be: as far apart as vectors of these cosines are.
MAX_GOLDEN_DEVIATION = 0.045
MAX_REPEATED_DEVIATION = 0.014
GOLDEN_TEXTS = (
    "a skin image",
    "This is a skin image of melanoma",
    "psoriasis",
    "erythematous plaque with silvery scale on the elbow",
)
NUM_GOLDEN_IMAGES = 4
_SIDE = 96


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs and what the model gave for them where it was made; what its kind does not give has no rows.

    Attributes:
        text_vectors, image_vectors: float32 `[N, D]`.
        predictions: of the images, float32 `[N, …]` by name.
    """

    preprocessing_digest: str
    texts: tuple[str, ...]
    images: tuple[bytes, ...]
    text_vectors: np.ndarray
    image_vectors: np.ndarray
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def make(cls, encoder: Encoder) -> Golden:
        """Ask a loaded model about drawn images and a few texts, as far as it answers."""
        images = tuple(_drawing(seed) for seed in range(NUM_GOLDEN_IMAGES))
        texts = GOLDEN_TEXTS if "texts" in encoder.answers else ()
        return cls(encoder.info.preprocessing_digest, texts, images, *_answers(encoder, texts, images))

    @classmethod
    def load(cls, folder: str) -> Golden | None:
        """Read `golden.json` of a model folder; None where there is none.

        Raises:
            ModelError: the file is damaged.
        """
        file = storage.join(folder, GOLDEN_NAME)
        try:
            document = storage.read_json(file)
        except FileNotFoundError:
            return None
        try:
            return cls(
                str(document["preprocessing_digest"]),
                tuple(map(str, document["texts"])),
                tuple(base64.b64decode(one, validate=True) for one in document["images"]),
                _from_text(document["text_vectors"], len(document["texts"])),
                _from_text(document["image_vectors"], len(document["images"]) if document["image_vectors"] else 0),
                {
                    str(name): _from_text(one["values"], len(document["images"])).reshape(one["shape"])
                    for name, one in document.get("predictions", {}).items()
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is damaged ({error}); write it again with jobs/register.py") from None

    def save(self, folder: str) -> None:
        """Write `golden.json` into a model folder."""
        document: dict[str, Any] = {
            "preprocessing_digest": self.preprocessing_digest,
            "texts": list(self.texts),
            "images": [base64.b64encode(one).decode() for one in self.images],
            "text_vectors": _to_text(self.text_vectors),
            "image_vectors": _to_text(self.image_vectors),
        }
        if self.predictions:
            document["predictions"] = {
                name: {"shape": list(one.shape), "values": _to_text(one)} for name, one in self.predictions.items()
            }
        storage.write_json(storage.join(folder, GOLDEN_NAME), document)


@lru_cache(maxsize=1)
def question() -> tuple[bytes, str]:
    """An image (JPEG) and a text of our own, to ask a model whether it answers."""
    return _drawing(0), GOLDEN_TEXTS[0]


def examine(encoder: Encoder, golden: Golden | None) -> list[Check]:
    """Every check of a loaded model; it may be served when all have passed."""
    return [smoke(encoder), _repeats(encoder), _matches(encoder, golden)]


def smoke(encoder: Encoder) -> Check:
    """Whether an image and, where the model takes them, some texts give finite unit vectors and finite predictions."""
    texts = GOLDEN_TEXTS if "texts" in encoder.answers else ()
    of_texts, of_images, predictions = _answers(encoder, texts, (_drawing(0),))
    lengths = np.concatenate([np.linalg.norm(vectors, axis=1) for vectors in (of_images, of_texts)])
    # A length that is not finite is no less than this.
    if not np.abs(lengths - 1).max(initial=0) < 1e-3:
        return Check("smoke", False, "vectors are not finite unit vectors")
    odd = [name for name, one in predictions.items() if not np.isfinite(one).all()]
    if odd:
        return Check("smoke", False, f"predictions are not finite: {', '.join(odd)}")
    found = ["vectors are finite and of length 1"] if len(lengths) else []
    return Check("smoke", True, ", ".join([*found, *(f"{name} is finite" for name in predictions)]))


def _answers(
    encoder: Encoder, texts: tuple[str, ...], images: tuple[bytes, ...]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Vectors of texts, vectors of images and predictions of images, as far as the model gives them."""
    nothing = np.zeros((0, encoder.info.embedding_dim), dtype=np.float32)
    pixels = np.stack([encoder.preprocess(one) for one in images])
    return (
        encoder.encode_texts(texts),
        encoder.encode_pixels(pixels) if "images" in encoder.answers else nothing,
        encoder.predict_pixels(pixels) if "predictions" in encoder.answers else {},
    )


def _repeats(encoder: Encoder) -> Check:
    images = tuple(_drawing(seed) for seed in range(NUM_GOLDEN_IMAGES))
    (_, together, predicted), (_, alone, expected) = _answers(encoder, (), images), _answers(encoder, (), images[:1])
    passed, detail = True, []
    if len(alone):
        cosine = float((together[:1] * alone).sum())
        passed = cosine >= MIN_REPEATED_COSINE
        detail.append(f"cosine of one image alone and in a batch: {cosine:.6f}")
    if expected:
        deviation = _deviation({name: one[:1] for name, one in predicted.items()}, expected)
        passed = passed and deviation <= MAX_REPEATED_DEVIATION
        detail.append(f"deviation of its predictions: {deviation:.6f}")
    return Check("repeats", passed, ", ".join(detail))


def _matches(encoder: Encoder, golden: Golden | None) -> Check:
    if golden is None:
        return Check("golden", True, f"the model folder has no {GOLDEN_NAME}: not compared")
    if golden.preprocessing_digest != encoder.info.preprocessing_digest:
        return Check("golden", True, "preprocessing differs from where the model was made: not compared")
    texts = golden.texts if "texts" in encoder.answers else ()
    of_texts, of_images, predictions = _answers(encoder, texts, golden.images)
    given = {"images": of_images, "texts": of_texts, **predictions}
    expected = {"images": golden.image_vectors, "texts": golden.text_vectors, **golden.predictions}
    shapes = [{name: list(one.shape) for name, one in each.items() if len(one)} for each in (given, expected)]
    if shapes[0] != shapes[1]:
        return Check("golden", False, f"answers are of the shapes {shapes[0]}, the golden ones of {shapes[1]}")
    passed, detail = True, []
    vectors = [name for name in ("images", "texts") if len(given[name])]
    if vectors:
        cosine = min(float((given[name] * expected[name]).sum(axis=1).min()) for name in vectors)
        passed = cosine >= MIN_GOLDEN_COSINE
        detail.append(f"smallest cosine with the golden embeddings: {cosine:.6f}")
    if predictions:
        deviation = _deviation(predictions, golden.predictions)
        passed = passed and deviation <= MAX_GOLDEN_DEVIATION
        detail.append(f"largest deviation from the golden predictions: {deviation:.6f}")
    return Check("golden", passed, ", ".join(detail))


def _deviation(given: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest distance of any image's prediction from what it should be, as a share of the length of that."""
    shares = []
    for name, one in expected.items():
        rows, wanted = given[name].reshape(len(one), -1), one.reshape(len(one), -1)
        lengths = np.maximum(np.linalg.norm(wanted, axis=1), np.finfo(np.float32).tiny)
        shares.append(np.linalg.norm(rows - wanted, axis=1) / lengths)
    return float(np.concatenate(shares).max())


def _drawing(seed: int) -> bytes:
    """A dark blot on skin colour as JPEG."""
    from PIL import Image

    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    centre = random.uniform(0.35, 0.65, 2)
    blot = np.exp(-(((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / random.uniform(0.01, 0.06)))[..., None]
    pixels = np.array([214, 170, 148]) * (1 - blot) + random.uniform(40, 120, 3) * blot
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _to_text(vectors: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()


def _from_text(text: str, num_rows: int) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    return values.reshape(num_rows, -1) if num_rows else values.reshape(0, 0)
