"""What the serving tests share: images, a tiny model folder, a backend without weights, a running Serve application."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dermray import images, storage
from dermray.errors import ImageError
from dermray.index.embeddings import Embeddings, Maker, Part, images_table, part_file, texts_table, to_parquet
from dermray.serving import ConceptScore, ServedModel, rank
from serve.backend import Annotated, Classified, Embedded, Rejection, Timing

CLASSES = ("melanoma", "melanocytic nevus", "psoriasis", "acne vulgaris", "vitiligo")


def photograph(seed: int = 0, *, size: tuple[int, int] = (96, 80), kind: str = "JPEG") -> bytes:
    """An encoded image of skin colour with a darker blot; the seed moves the blot."""
    random = np.random.default_rng(seed)
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    centre = random.uniform(0.3, 0.7, 2) * (height, width)
    distance = np.hypot(rows - centre[0], columns - centre[1]) / min(size)
    blot = np.clip(1.6 - 6 * distance, 0, 1)[..., None]
    skin, dark = np.array([214, 170, 148]), random.uniform(40, 120, 3)
    noise = random.normal(0, 4, (height, width, 3))
    pixels = np.clip(skin * (1 - blot) + dark * blot + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def bomb_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG whose header announces far more pixels than its few bytes hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def data_uri(data: bytes, media_type: str = "image/jpeg") -> str:
    """The data URI of an image."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def save_tiny_model(folder: Path, classes: Sequence[str] = CLASSES) -> Path:
    """A model folder with random weights, seconds to load."""
    import torch

    from dermray import models

    torch.manual_seed(0)
    model, _, _ = models.create("dermray_tiny")
    cfg = models.architecture("dermray_tiny")
    models.save(model, str(folder), model_cfg=cfg, provenance={"classes": list(classes)})
    return folder


class DummyBackend:
    """A `Backend` without weights: vectors are hashes of the input, images are really decoded."""

    def __init__(self, classes: Sequence[str] = CLASSES, *, failure: Exception | None = None) -> None:
        self.model = ServedModel(
            name="dummy",
            version="3",
            alias="champion",
            digest="d" * 64,
            preprocessing_digest="e" * 64,
            embedding_dim=8,
            image_size=32,
            context_length=77,
            parameters=0,
            logit_scale=100.0,
            classes=tuple(classes),
        )
        self.failure = failure
        self.asked_templates: Sequence[str] | None = None

    async def embed(self, images: Sequence[bytes], texts: Sequence[str]) -> Embedded:
        """Vectors from digests."""
        if self.failure is not None:
            raise self.failure
        rejections = [r for i, data in enumerate(images) if (r := _rejection(i, data)) is not None]
        if rejections:
            return Embedded(self._vectors([]), self._vectors([]), Timing(), tuple(rejections))
        timing = Timing(0.001, 0.002, 0.003, 0.0, (2,) * (len(images) + len(texts)))
        return Embedded(self._vectors(images), self._vectors([t.encode() for t in texts]), timing)

    async def classify(self, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
        """A ranking by those vectors."""
        self.asked_templates = templates
        embedded = await self.embed([image], [])
        if embedded.rejections:
            return Classified((), embedded.timing, embedded.rejections[0])
        weights = self._vectors([label.encode() for label in labels])
        return Classified(tuple(rank(embedded.images[0], weights, labels, 100.0)), embedded.timing)

    async def annotate(self, image: bytes, concepts: Sequence[str]) -> Annotated:
        """The same score for every concept."""
        embedded = await self.embed([image], [])
        if embedded.rejections:
            return Annotated((), embedded.timing, embedded.rejections[0])
        return Annotated(tuple(ConceptScore(name, 0.5) for name in concepts), embedded.timing)

    async def probe(self) -> None:
        """Fails when it was told to."""
        if self.failure is not None:
            raise self.failure

    def _vectors(self, data: Sequence[bytes]) -> np.ndarray:
        digests = [np.frombuffer(hashlib.sha256(one).digest(), np.uint8)[:8] for one in data]
        vectors = np.array(digests, np.float32).reshape(len(data), 8) - 127.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _rejection(index: int, data: bytes) -> Rejection | None:
    try:
        images.decode(data)
    except ImageError as error:
        return Rejection(index, error.reason, str(error))
    return None


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(**arguments: object) -> Iterator[str]:
    """A real Serve application on the connected Ray cluster; yields its base URL and stops it."""
    from ray import serve

    from serve.app import build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(dict(arguments)), name="dermray-test", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def save_embeddings(folder: Path, *, num_parts: int = 1, rows: int = 40, dim: int = 8) -> np.ndarray:
    """Embeddings of the dummy model over random unit vectors, as jobs/embed.py leaves them; returns the vectors."""
    maker = Maker(name="dummy", embedding_dim=dim, model_digest="d" * 64, preprocessing_digest="e" * 64)
    vectors = np.random.default_rng(0).normal(size=(num_parts * rows, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parts = []
    for number in range(num_parts):
        name, span = f"part-{number:05d}", range(number * rows, (number + 1) * rows)
        ids, captions = [f"sample-{i}" for i in span], [f"caption {i}" for i in span]
        own = vectors[span.start : span.stop]
        thumbnails = [b"jpeg %d" % i for i in span]
        images = images_table(ids, own, captions, [["psoriasis"]] * rows, thumbnails)
        for kind, table in (("images", images), ("texts", texts_table(ids, captions, own))):
            storage.write_bytes(part_file(str(folder), kind, name), to_parquet(table, row_group_size=64))
        parts.append(Part(name=name, maker=maker, num_images=rows, num_texts=rows, failures={}))
    manifest = Embeddings(maker=maker, corpus_uri="corpus", corpus_digest="c", content={}, parts=tuple(parts))
    storage.write_text(storage.join(str(folder), "embeddings.json"), manifest.model_dump_json())
    return vectors
