"""The one way from image bytes and texts to unit vectors, and to what a model predicts of images by itself.

Evaluation, batch embedding and serving all use it, for models of every kind (`dermray.models.kinds`).

Images go through `dermray.images.decode` and then the model's own validation transform, so preprocessing
equals the published one: shorter side to the model's size (bicubic, antialiased), centre crop, mean and
standard deviation of the model's configuration. Texts go through the model's own tokeniser.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, cpu_count
from typing import Any, Self, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from PIL import Image
from torch import nn

from dermray import images, models, storage
from dermray.errors import ImageError, ModelError
from dermray.model_uri import LOCAL_PREFIX
from dermray.models import kinds, layout
from dermray.models.factory import ImageTransform, Tokenizer
from dermray.models.image_encoders import ImageEncoder
from dermray.models.kinds import Answer
from dermray.models.texts import expanded, grouped
from dermray.vectors.encoder_info import WITHOUT_TEXTS, EncoderInfo, Precision

ItemT = TypeVar("ItemT")

# What happens to bytes before the model's own transform; part of the preprocessing digest.
DECODE_RULES = {
    "orientation": "exif",
    "alpha": "over white",
    "colour": "rgb uint8",
    "profile": "to sRGB",
    "animation": "first frame",
}
MAX_DECODE_THREADS = 16
# Why an image has no vector, where there are no bytes for it.
MISSING = "missing"
_HASH_CHUNK_BYTES = 1 << 22


class Encoder:
    """A model with its transform and tokeniser, ready to embed. Thread-safe; equal input, equal vectors."""

    def __init__(
        self,
        model: nn.Module,
        image_transform: ImageTransform,
        tokenizer: Tokenizer | None,
        *,
        name: str,
        model_digest: str | None = None,
        device: str | None = None,
        precision: Precision = "fp32",
        answers: frozenset[Answer] | None = None,
    ) -> None:
        """Wrap a loaded model; use `Encoder.load` to get one from a folder or a name.

        Args:
            model: an open_clip model: `encode_image`, `encode_text`, `logit_scale`; or an `ImageEncoder`.
            image_transform: PIL image to float32 `[3, S, S]`.
            tokenizer: N texts to int64 `[N, L]`; None: of an `ImageEncoder`, which takes no texts.
            name: what to call it in reports.
            model_digest: SHA-256 of its weights file; without it the tensors are hashed.
            device: `cpu`, `cuda`, `cuda:1`; empty: a GPU if there is one.
            precision: `bf16` runs the towers under autocast; vectors are float32 all the same.
            answers: what its kind can be asked; None: vectors of images, and of texts where there is a tokeniser.

        Raises:
            ModelError: an unknown precision.
        """
        if precision not in get_args(Precision):
            raise ModelError(f"precision {precision!r} is unknown: give one of {', '.join(get_args(Precision))}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        digest = model_digest or _state_digest(model)
        self.answers = answers or kinds.OURS[layout.CLIP if tokenizer is not None else layout.IMAGE_ENCODER].answers
        self._model = model.to(self.device).eval()
        self._name = name
        self._transform = image_transform
        self._tokenizer = tokenizer
        self._precision = precision
        # Fast tokenisers of `transformers` refuse to be borrowed by two threads at once.
        self._tokenizer_lock = threading.Lock()
        if isinstance(model, ImageEncoder):
            preprocessing, side, self._resized_side = model.preprocessing, model.image_size, model.resized_side
            self.logit_scale = math.nan
        else:
            preprocessing = get_model_preprocess_cfg(model)
            sides = preprocessing["size"]
            side = self._resized_side = int(sides if isinstance(sides, int) else sides[0])
            self.logit_scale = float(model.logit_scale.exp().item())  # type: ignore[operator]
        self.info = EncoderInfo(
            name=name,
            embedding_dim=self._dimension(side),
            image_size=side,
            context_length=0 if tokenizer is None else int(tokenizer([""]).shape[1]),
            model_digest=digest,
            preprocessing_digest=_canonical_digest({"decode": DECODE_RULES, "transform": preprocessing}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    @classmethod
    def load(
        cls,
        uri: str | PathLike[str],
        *,
        device: str | None = None,
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> Encoder:
        """Load a folder of a model or an image encoder (path, URI or `local-dir:`), or a model by its open_clip name.

        Args:
            compiled: hand the image tower to torch.compile; the first pass of each batch size class is slow then.

        Raises:
            ModelError: unknown name or kind, missing or malformed files, or an unknown precision.
        """
        name = str(uri)
        folder = name.removeprefix(LOCAL_PREFIX)
        weights = layout.weights_of(folder)
        kind = kinds.of(name)
        own: dict[str, Any] = {"device": device, "precision": precision, "answers": kind.answers}
        if weights is None and kind is kinds.OURS[layout.CLIP]:
            model, transform, tokenizer = models.create(name)
            return cls(model, transform, tokenizer, name=name, **own)._compiled(compiled)
        weights = weights or layout.SAFE_WEIGHTS_NAME
        # A remote folder comes down once for both the weights and their digest.
        with layout.local(folder) as path:
            if not (path / weights).exists():
                raise ModelError(f"{folder} has no {weights}")
            made = kind.load(path)
            digest = _file_digest(str(path / weights))
        return cls(*made, name=storage.name_of(folder), model_digest=digest, **own)._compiled(compiled)

    def _compiled(self, wanted: bool) -> Self:
        if wanted:
            self._model.visual.compile(dynamic=True)  # type: ignore[union-attr]
        return self

    def _dimension(self, side: int) -> int:
        """Length of a vector, found with an empty text, or an image where there are no texts; 0 without vectors."""
        if self._tokenizer is not None:
            return int(self.encode_texts([""]).shape[1])
        if "images" not in self.answers:
            return 0
        return int(self.encode_pixels(np.zeros((1, 3, side, side), dtype=np.float32)).shape[1])

    @images.costs_one_image
    def preprocess(self, data: bytes) -> np.ndarray:
        """Encoded image to the model's input, float32 `[3, S, S]`.

        Raises:
            ImageError: the bytes are not an acceptable image; `too_elongated`: bringing its shorter side to the model's
                would take more than `image_bounds.MAX_ENLARGED_PIXELS`.
        """
        pixels = images.decode(data, enlarged_side=self._resized_side)
        return self._transform(Image.fromarray(pixels)).numpy()

    @torch.inference_mode()
    def encode_pixels(self, pixels: np.ndarray, *, normalise: bool = True) -> np.ndarray:
        """Preprocessed images, float32 `[N, 3, S, S]`, to unit vectors, float32 `[N, D]`, in one pass.

        Without `normalise` the vectors keep the length that the tower gives them, as linear probes want them.

        Raises:
            ModelError: the model gives none.
        """
        if "images" not in self.answers:
            raise ModelError(f"{self._name} gives no {kinds.IN_WORDS['images']}")
        if len(pixels) == 0:
            return np.zeros((0, self.info.embedding_dim), dtype=np.float32)
        with self._autocast():
            features = self._model.encode_image(self._on_device(pixels))  # type: ignore[operator]
        return _unit(features) if normalise else features.float().cpu().numpy()

    @torch.inference_mode()
    def predict_pixels(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Preprocessed images, float32 `[N, 3, S, S]`, N ≥ 1, to what the model predicts: float32 `[N, …]` by name.

        Raises:
            ModelError: the model predicts nothing by itself, or something else than so many rows.
        """
        if "predictions" not in self.answers:
            raise ModelError(f"{self._name} gives no {kinds.IN_WORDS['predictions']}")
        with self._autocast():
            given = self._model.predict(self._on_device(pixels))  # type: ignore[operator]
        found = {name: value.float().cpu().numpy() for name, value in given.items()}
        odd = next((name for name, value in found.items() if value.shape[:1] != (len(pixels),)), None)
        if odd is not None:
            raise ModelError(f"{self._name} predicts {odd} of shape {list(found[odd].shape)} for {len(pixels)} images")
        return found

    def _on_device(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)

    def encode_images(self, images: Sequence[bytes], *, batch_size: int = 64) -> np.ndarray:
        """Encoded images to unit vectors, float32 `[N, D]`, in their order.

        Raises:
            ImageError: one of them is not an acceptable image; it says which, and nothing is returned then.
        """
        vectors = [np.zeros((0, self.info.embedding_dim), dtype=np.float32)]
        vectors.extend(self.encode_pixels(np.stack(batch)) for batch in self._decoded(images, batch_size, _raise_of))
        return np.concatenate(vectors)

    def encode_readable(
        self, images: Sequence[bytes | None], *, batch_size: int = 64, normalise: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encoded images to vectors; one that is no image costs its row alone.

        Args:
            images: encoded; None: there is none.
            batch_size: images per forward pass.
            normalise: vectors of length 1, else in the length that the tower gives them.

        Returns:
            Vectors, float32 `[N, D]`, zeros where there is none; why there is none, object `[N]`: `missing`, a reason
            of `ImageError`, or empty.
        """
        vectors = np.zeros((len(images), self.info.embedding_dim), dtype=np.float32)
        reasons = np.full(len(images), "", dtype=object)
        for rows, pixels, left_out in self._readable(images, batch_size):
            vectors[rows] = self.encode_pixels(pixels, normalise=normalise)
            reasons[list(left_out)] = list(left_out.values())
        return vectors, reasons

    def predict_readable(
        self, images: Sequence[bytes | None], *, batch_size: int = 64
    ) -> tuple[list[dict[str, np.ndarray] | None], np.ndarray]:
        """What the model predicts of those images that can be read, a float32 array by name for each.

        Returns:
            Predictions, None where there is none; why there is none, object `[N]`, as in `encode_readable`.

        Raises:
            ModelError: as in `predict_pixels`.
        """
        found: list[dict[str, np.ndarray] | None] = [None] * len(images)
        reasons = np.full(len(images), "", dtype=object)
        for rows, pixels, left_out in self._readable(images, batch_size):
            predicted = self.predict_pixels(pixels) if rows else {}
            for place, row in enumerate(rows):
                found[row] = {name: values[place] for name, values in predicted.items()}
            reasons[list(left_out)] = list(left_out.values())
        return found, reasons

    def _readable(
        self, images: Sequence[bytes | None], batch_size: int
    ) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
        """Batches: the rows that can be read, their pixels, and of the others the reason by row."""
        start = 0
        for batch in self._decoded(images, batch_size, lambda _, error: error):
            rows = [row for row, one in enumerate(batch, start) if isinstance(one, np.ndarray)]
            side = self.info.image_size
            pixels = (
                np.stack([batch[row - start] for row in rows]) if rows else np.zeros((0, 3, side, side), np.float32)
            )
            yield (
                rows,
                pixels,
                {at: one.reason for at, one in enumerate(batch, start) if not isinstance(one, np.ndarray)},
            )
            start += len(batch)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Texts to unit vectors, float32 `[N, D]`; longer ones are cut at the model's context length.

        Raises:
            ModelError: the model takes no texts.
        """
        if not texts:
            return np.zeros((0, self.info.embedding_dim), dtype=np.float32)
        if self._tokenizer is None:
            raise ModelError(WITHOUT_TEXTS.format(self.info.name))
        vectors = []
        for batch in _batches(texts, batch_size):
            with self._tokenizer_lock:
                tokens = self._tokenizer(list(batch))
            rows, index = grouped(self._model, tokens, self.device)
            with self._autocast():
                features = self._model.encode_text(rows)  # type: ignore[operator]
            vectors.append(_unit(expanded(features, index)))
        return np.concatenate(vectors)

    def _decoded(
        self, data: Sequence[bytes | None], batch_size: int, refused: Callable[[int, ImageError], Any]
    ) -> Iterator[list[Any]]:
        """Batches of preprocessed images; the next one is decoded while the caller computes with this one.

        In the place of an image that cannot be had stands what `refused` makes of its number and the error.
        """

        def attempt(number: int, one: bytes | None) -> Any:
            try:
                if one is None:
                    raise ImageError(MISSING, "there are no bytes")
                return self.preprocess(one)
            except ImageError as error:
                return refused(number, error)

        # On the CPU the towers use every core themselves; beside a GPU the cores are free to decode.
        num_threads = 1 if self.device.type == "cpu" else min(MAX_DECODE_THREADS, cpu_count() or 1)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
            ahead: list[Future[Any]] = []
            for batch in _batches(list(enumerate(data)), batch_size):
                submitted = [pool.submit(attempt, *one) for one in batch]
                if ahead:
                    yield [future.result() for future in ahead]
                ahead = submitted
            if ahead:
                yield [future.result() for future in ahead]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16")


def _raise_of(number: int, error: ImageError) -> Any:
    raise ImageError(error.reason, f"image {number}: {error}") from error


def _batches(items: Sequence[ItemT], batch_size: int) -> Iterator[Sequence[ItemT]]:
    return (items[start : start + batch_size] for start in range(0, len(items), batch_size))


def _unit(features: torch.Tensor) -> np.ndarray:
    return F.normalize(features.float(), dim=-1).cpu().numpy()


def _canonical_digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _state_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
