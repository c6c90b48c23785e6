"""The one way from image bytes and texts to unit vectors: evaluation, batch embedding and serving all use it.

Images go through `dermray.images.decode` and then the model's own validation transform, so preprocessing
equals the published one: shorter side to the model's size (bicubic, antialiased), centre crop, mean and
standard deviation of the model's configuration. Texts go through the model's own tokeniser.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike, cpu_count
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from PIL import Image
from torch import nn

from dermray import images, models, storage
from dermray.errors import ImageError, ModelError
from dermray.models.texts import expanded, grouped

Precision = Literal["fp32", "bf16"]
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


@dataclass(frozen=True)
class EncoderInfo:
    """What made a vector: enough to decide whether two vectors may be compared."""

    name: str
    embedding_dim: int
    image_size: int
    context_length: int
    # SHA-256 of the weights file, or of names and values of all tensors where a model has no folder.
    model_digest: str
    # SHA-256 of the canonical JSON of the model's preprocessing and of `DECODE_RULES`.
    preprocessing_digest: str
    parameters: int


class Encoder:
    """A model with its transform and tokeniser, ready to embed. Thread-safe; equal input, equal vectors."""

    def __init__(
        self,
        model: nn.Module,
        image_transform: models.factory.ImageTransform,
        tokenizer: models.factory.Tokenizer,
        *,
        name: str,
        model_digest: str | None = None,
        device: str | None = None,
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        """Wrap a loaded model; use `Encoder.load` to get one from a folder or a name.

        Args:
            model: an open_clip model: `encode_image`, `encode_text`, `logit_scale`.
            image_transform: PIL image to float32 `[3, S, S]`.
            tokenizer: N texts to int64 `[N, L]`.
            name: what to call it in reports.
            model_digest: SHA-256 of its weights file; without it the tensors are hashed.
            device: `cpu`, `cuda`, `cuda:1`; empty: a GPU if there is one.
            precision: `bf16` runs the towers under autocast; vectors are float32 all the same.
            compiled: hand the image tower to torch.compile; the first pass of each batch size class is slow then.

        Raises:
            ModelError: an unknown precision.
        """
        if precision not in get_args(Precision):
            raise ModelError(f"precision {precision!r} is unknown: give one of {', '.join(get_args(Precision))}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        digest = model_digest or _state_digest(model)
        self._model = model.to(self.device).eval()
        if compiled:
            self._model.visual.compile(dynamic=True)  # type: ignore[union-attr]
        self._transform = image_transform
        self._tokenizer = tokenizer
        self._precision = precision
        # Fast tokenisers of `transformers` refuse to be borrowed by two threads at once.
        self._tokenizer_lock = threading.Lock()
        preprocessing = get_model_preprocess_cfg(model)
        side = preprocessing["size"]
        self.logit_scale = float(model.logit_scale.exp().item())  # type: ignore[operator]
        self.info = EncoderInfo(
            name=name,
            embedding_dim=self.encode_texts([""]).shape[1],
            image_size=int(side if isinstance(side, int) else side[0]),
            context_length=int(tokenizer([""]).shape[1]),
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
        """Load a model folder (path, URI or `local-dir:`), or a model by its open_clip name.

        Raises:
            ModelError: unknown name, missing or malformed files, or an unknown precision.
        """
        name = str(uri)
        folder = name.removeprefix(models.factory.LOCAL_PREFIX)
        weights = models.folder.weights_of(folder)
        if weights is None:
            model, transform, tokenizer = models.create(name)
            return cls(model, transform, tokenizer, name=name, device=device, precision=precision, compiled=compiled)
        # A remote folder comes down once for both the weights and their digest.
        with storage.local_folder(folder) as path:
            model, transform, tokenizer = models.create(str(path))
            digest = _file_digest(str(path / weights))
        label = storage.name_of(folder)
        return cls(
            model,
            transform,
            tokenizer,
            name=label,
            model_digest=digest,
            device=device,
            precision=precision,
            compiled=compiled,
        )

    def preprocess(self, data: bytes) -> np.ndarray:
        """Encoded image to the model's input, float32 `[3, S, S]`.

        Raises:
            ImageError: the bytes are not an acceptable image.
        """
        pixels = images.decode(data)
        return self._transform(Image.fromarray(pixels)).numpy()

    @torch.inference_mode()
    def encode_pixels(self, pixels: np.ndarray, *, normalise: bool = True) -> np.ndarray:
        """Preprocessed images, float32 `[N, 3, S, S]`, to unit vectors, float32 `[N, D]`, in one pass.

        Without `normalise` the vectors keep the length that the tower gives them, as linear probes want them.
        """
        if len(pixels) == 0:
            return np.zeros((0, self.info.embedding_dim), dtype=np.float32)
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        with self._autocast():
            features = self._model.encode_image(batch)  # type: ignore[operator]
        return _unit(features) if normalise else features.float().cpu().numpy()

    def encode_images(self, images: Sequence[bytes], *, batch_size: int = 64) -> np.ndarray:
        """Encoded images to unit vectors, float32 `[N, D]`, in their order.

        Raises:
            ImageError: one of them is not an acceptable image; nothing is returned then.
        """
        vectors = [np.zeros((0, self.info.embedding_dim), dtype=np.float32)]
        vectors.extend(self.encode_pixels(np.stack(batch)) for batch in self._decoded(images, batch_size, _raise))
        return np.concatenate(vectors)

    def encode_readable(self, images: Sequence[bytes | None], *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Encoded images to vectors in the length that the tower gives them; one that is no image costs its row alone.

        Args:
            images: encoded; None: there is none.
            batch_size: images per forward pass.

        Returns:
            Vectors, float32 `[N, D]`, zeros where there is none; why there is none, object `[N]`: `missing`, a reason
            of `ImageError`, or empty.
        """
        vectors = np.zeros((len(images), self.info.embedding_dim), dtype=np.float32)
        reasons = np.full(len(images), "", dtype=object)
        start = 0
        for batch in self._decoded(images, batch_size, lambda error: error):
            rows = [row for row, one in enumerate(batch, start) if isinstance(one, np.ndarray)]
            if rows:
                pixels = np.stack([batch[row - start] for row in rows])
                vectors[rows] = self.encode_pixels(pixels, normalise=False)
            reasons[start : start + len(batch)] = ["" if isinstance(one, np.ndarray) else one.reason for one in batch]
            start += len(batch)
        return vectors, reasons

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Texts to unit vectors, float32 `[N, D]`; longer ones are cut at the model's context length."""
        if not texts:
            return np.zeros((0, self.info.embedding_dim), dtype=np.float32)
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
        self, data: Sequence[bytes | None], batch_size: int, refused: Callable[[ImageError], Any]
    ) -> Iterator[list[Any]]:
        """Batches of preprocessed images; the next one is decoded while the caller computes with this one.

        In the place of an image that cannot be had stands what `refused` makes of the error.
        """

        def attempt(one: bytes | None) -> Any:
            try:
                if one is None:
                    raise ImageError(MISSING, "there are no bytes")
                return self.preprocess(one)
            except ImageError as error:
                return refused(error)

        # On the CPU the towers use every core themselves; beside a GPU the cores are free to decode.
        num_threads = 1 if self.device.type == "cpu" else min(MAX_DECODE_THREADS, cpu_count() or 1)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
            ahead: list[Future[Any]] = []
            for batch in _batches(data, batch_size):
                submitted = [pool.submit(attempt, one) for one in batch]
                if ahead:
                    yield [future.result() for future in ahead]
                ahead = submitted
            if ahead:
                yield [future.result() for future in ahead]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16")


def _raise(error: ImageError) -> Any:
    raise error


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
