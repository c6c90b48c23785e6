"""What the serving tests share: images, a tiny model folder, a backend without weights, a running Serve application."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn
from fastapi import FastAPI
from PIL import Image

from dermray import images, storage
from dermray.errors import ImageError
from dermray.predict import ConceptScore, ServedModel, locate, rank
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.verbs.annotate import Annotated
from dermray.service.engine.verbs.classify import Classified
from dermray.service.engine.verbs.embed import Embedded
from dermray.service.engine.verbs.predict import Predicted
from dermray.service.fleet.catalogue import Catalogue, Served, Slot
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig, ServeConfig
from dermray.vectors.index.embeddings import Embeddings, Maker, Part, images_table, part_file, texts_table, to_parquet
from dermray.vectors.index.vectors import VectorIndex, build

# A host name that the service takes for its own; the test client's own one is not.
LOCAL = "http://127.0.0.1"
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


def animated_gif() -> bytes:
    """A GIF of two frames."""
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("salmon", "brown")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def data_uri(data: bytes, media_type: str = "image/jpeg") -> str:
    """The data URI of an image."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def save_tiny_model(folder: Path, classes: Sequence[str] = CLASSES, *, seed: int = 0, damaged: bool = False) -> Path:
    """A model folder with random weights, seconds to load; `damaged`: some are NaN."""
    import torch

    from dermray import models

    torch.manual_seed(seed)
    model, _, _ = models.create("dermray_tiny")
    if damaged:
        next(model.visual.parameters()).data.fill_(float("nan"))
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

    async def predict(self, image: bytes) -> Predicted:
        """The vector of the digest by another name."""
        return Predicted({"digest": self._vectors([image])[0]}, Timing())

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


def replica_pids(deployment: str) -> list[int]:
    """Processes of a deployment's replicas on this machine, the oldest first."""
    return pids_of(f"ServeReplica:dermray-test:{deployment}")


def pids_of(title: str) -> list[int]:
    """Processes of the connected Ray cluster that are called so, the oldest first."""
    import ray

    cluster, found = ray.get_runtime_context().gcs_address, []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # Behind the name stands what it is doing.
            name = " ".join(process.cmdline()).partition(".")[0].strip()
            if name == f"ray::{title}" and cluster in " ".join(process.parent().cmdline()):
                found.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(found)]


def kill_encoder() -> int:
    """SIGKILL one encoder replica, the oldest; returns its process id, 0 when there is none."""
    pids = replica_pids("encoder")
    for pid in pids[:1]:
        os.kill(pid, signal.SIGKILL)
    return pids[0] if pids else 0


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_app(folders: Sequence[Path], *, index: Path | None = None, **keys: Any) -> FastAPI:
    """The whole application over real engines in this process, without Ray."""
    from dermray.service.engine.engine import Engine
    from dermray.service.fleet.replica import LocalBackend
    from dermray.service.fleet.rollout import load_ontology

    slots = []
    for folder in folders:
        source = locate(str(folder))
        engine = Engine(source, ServeConfig(model=str(folder), device="cpu", **keys))
        slots.append(Slot(Served(LocalBackend(engine), load_ontology(source), source)))
    loaded = VectorIndex.load(str(index)) if index is not None else None
    return create_app(Catalogue(slots), LimitsConfig(), index=loaded)


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a port of loopback; yields its base URL and stops it."""
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not come up"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def running(**arguments: object) -> Iterator[str]:
    """A real Serve application on the connected Ray cluster; yields its base URL and stops it."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from dermray.service.fleet.command import start_serve, stop_serve
    from serve.app import build

    port = free_port()
    start_serve(HTTPOptions(host="127.0.0.1", port=port))
    try:
        serve.run(build(dict(arguments)), name="dermray-test", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_serve()


def save_embeddings(folder: Path, *, num_parts: int = 1, rows: int = 40, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Embeddings of the dummy model over random unit vectors, as jobs/embed.py leaves them; returns the vectors."""
    maker = Maker(name="dummy", embedding_dim=dim, model_digest="d" * 64, preprocessing_digest="e" * 64)
    vectors = np.random.default_rng(seed).normal(size=(num_parts * rows, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    thumbnails = [b"jpeg %d" % number for number in range(len(vectors))]
    write_embeddings(folder, maker, vectors, thumbnails, rows=rows)
    return vectors


def save_index(folder: Path, model: Path, num_images: int = 24) -> Path:
    """An index of photographs by a model, as jobs/embed.py and jobs/index.py make it."""
    from dermray.vectors.encoder import Encoder

    encoder = Encoder.load(str(model), device="cpu")
    photographs = [photograph(seed) for seed in range(num_images)]
    info = encoder.info
    maker = Maker(
        name=info.name,
        embedding_dim=info.embedding_dim,
        model_digest=info.model_digest,
        preprocessing_digest=info.preprocessing_digest,
    )
    write_embeddings(folder / "embeddings", maker, encoder.encode_images(photographs), photographs, rows=num_images)
    build(str(folder / "embeddings"), str(folder / "index"))
    return folder / "index"


def write_embeddings(
    folder: Path, maker: Maker, vectors: np.ndarray, thumbnails: Sequence[bytes], *, rows: int
) -> None:
    """A folder of embeddings in parts of `rows`; every row has a caption and a label."""
    parts = []
    for number, start in enumerate(range(0, len(vectors), rows)):
        name, span = f"part-{number:05d}", range(start, start + rows)
        ids, captions = [f"sample-{i}" for i in span], [f"caption {i}" for i in span]
        own = vectors[start : start + rows]
        images = images_table(ids, own, captions, [["psoriasis"]] * rows, thumbnails[start : start + rows])
        digests = {}
        for kind, table in (("images", images), ("texts", texts_table(ids, captions, own))):
            data = to_parquet(table, row_group_size=64)
            storage.write_bytes(part_file(str(folder), kind, name), data)
            digests[f"{kind}_sha256"] = hashlib.sha256(data).hexdigest()
        parts.append(Part(name=name, num_images=rows, num_texts=rows, failures={}, **digests))
    manifest = Embeddings(maker=maker, corpus_uri="corpus", corpus_digest="c", content={}, parts=tuple(parts))
    storage.write_text(storage.join(str(folder), "embeddings.json"), manifest.model_dump_json())
