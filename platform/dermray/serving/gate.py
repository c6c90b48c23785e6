"""What a model must show before it is served: golden embeddings reproduced, and sane answers to smoke requests.

Golden embeddings are what the model gave for a few inputs where it was made (`golden.json` in its folder). They are
compared where the preprocessing is equal, so that another device, precision or library that moves vectors is seen
before a client sees it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dermray import storage
from dermray.errors import ModelError

if TYPE_CHECKING:
    from dermray.encoder import Encoder

GOLDEN_NAME = "golden.json"
MIN_GOLDEN_COSINE = 0.999
MIN_REPEATED_COSINE = 0.9999
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
    """Inputs and the vectors, float32 `[N, D]`, that the model gave for them where it was made."""

    preprocessing_digest: str
    texts: tuple[str, ...]
    images: tuple[bytes, ...]
    text_vectors: np.ndarray
    image_vectors: np.ndarray

    @classmethod
    def make(cls, encoder: Encoder) -> Golden:
        """Ask a loaded model about a few texts and drawn images."""
        images = tuple(_drawing(seed) for seed in range(NUM_GOLDEN_IMAGES))
        return cls(
            encoder.info.preprocessing_digest,
            GOLDEN_TEXTS,
            images,
            encoder.encode_texts(GOLDEN_TEXTS),
            encoder.encode_images(images),
        )

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
                _from_text(document["image_vectors"], len(document["images"])),
            )
        except (KeyError, TypeError, ValueError) as error:
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
        storage.write_json(storage.join(folder, GOLDEN_NAME), document)


def examine(encoder: Encoder, golden: Golden | None) -> list[Check]:
    """Every check of a loaded model; it may be served when all have passed."""
    return [smoke(encoder), _repeats(encoder), _matches(encoder, golden)]


def smoke(encoder: Encoder) -> Check:
    """Whether an image and some texts give finite unit vectors."""
    vectors = np.concatenate([encoder.encode_images([_drawing(0)]), encoder.encode_texts(GOLDEN_TEXTS)])
    lengths = np.linalg.norm(vectors, axis=1)
    sane = bool(np.isfinite(vectors).all() and np.abs(lengths - 1).max() < 1e-3)
    return Check("smoke", sane, "vectors are finite and of length 1" if sane else "vectors are not finite unit vectors")


def _repeats(encoder: Encoder) -> Check:
    pixels = np.stack([encoder.preprocess(_drawing(seed)) for seed in range(NUM_GOLDEN_IMAGES)])
    together, alone = encoder.encode_pixels(pixels), encoder.encode_pixels(pixels[:1])
    cosine = float((together[:1] * alone).sum())
    return Check("repeats", cosine >= MIN_REPEATED_COSINE, f"cosine of one image alone and in a batch: {cosine:.6f}")


def _matches(encoder: Encoder, golden: Golden | None) -> Check:
    if golden is None:
        return Check("golden", True, f"the model folder has no {GOLDEN_NAME}: not compared")
    if golden.preprocessing_digest != encoder.info.preprocessing_digest:
        return Check("golden", True, "preprocessing differs from where the model was made: not compared")
    given = np.concatenate([encoder.encode_images(golden.images), encoder.encode_texts(golden.texts)])
    expected = np.concatenate([golden.image_vectors, golden.text_vectors])
    if given.shape != expected.shape:
        return Check("golden", False, f"vectors are {list(given.shape)}, the golden ones {list(expected.shape)}")
    cosine = float((given * expected).sum(axis=1).min())
    return Check("golden", cosine >= MIN_GOLDEN_COSINE, f"smallest cosine with the golden embeddings: {cosine:.6f}")


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
