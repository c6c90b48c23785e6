"""A codec that raises anything at one image, on every way that images go: that image is told, nothing else is lost."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import simplejpeg
from PIL import Image, ImageFile

from dermray import images, reporting
from dermray.audit import leakage
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.errors import CorpusError, ImageError
from dermray.evaluate import report as evaluation_report
from dermray.evaluate.samples import Samples
from dermray.ingest.decoding import Decoder, read, unpacked
from dermray.ingest.settings import DataConfig
from dermray.models import factory
from dermray.prepare import report
from dermray.service.engine.decoding import DecodePool
from dermray.tracking.flavour import DermRayModel
from dermray.train.objectives.contrastive.validation import Validator
from dermray.train.objectives.contrastive.views import ImageAndCaption
from dermray.train.settings import ValidationConfig
from dermray.vectors.encoder import Encoder
from dermray.vectors.index import embed
from tests import corpora, raw_corpus
from tests.serving import photograph
from tests.unit.test_prepare_shard import make, reported, settings
from tests.unit.test_write_faults import _export

NUM = 4
ERRORS = (RuntimeError, MemoryError, SystemError, struct.error, OSError, ValueError, AttributeError)
# Calls into codecs: where they are, and the format of images that get there.
CALLS: dict[str, tuple[Any, str, str]] = {
    "jpeg decoder": (simplejpeg, "decode_jpeg", "JPEG"),
    "jpeg encoder": (simplejpeg, "encode_jpeg", "JPEG"),
    "open": (Image, "open", "PNG"),
    "load": (ImageFile.ImageFile, "load", "PNG"),
    "resize": (Image.Image, "resize", "JPEG"),
    "reduce": (cv2, "resize", "PNG"),
    "smooth": (cv2, "GaussianBlur", "PNG"),
}


class Fault:
    """Raises at the first call while it is on."""

    def __init__(self, error: Exception, call: Callable[..., Any]) -> None:
        self.error, self.call, self.on, self.fired = error, call, True, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.on and not self.fired:
            self.fired += 1
            raise self.error
        return self.call(*args, **kwargs)


class World:
    """The same images raw, in a corpus and alone, and a model: made once for each format."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.encoded = folder, [photograph(seed, size=(90, 80), kind=kind) for seed in range(NUM)]
        raw_corpus.write(folder / "raw", num_good=NUM)
        for number, data in enumerate(self.encoded):
            (folder / "raw" / "images" / f"{number:03d}.jpg").write_bytes(data)
        self.corpus = str(folder / "corpus")
        (folder / "corpus" / "data").mkdir(parents=True)
        rows = [corpora.sample(number, "train", image=data) for number, data in enumerate(self.encoded)]
        self.ids = [row["sample_id"] for row in rows]
        shard = corpora.write_shard(folder / "corpus", "data/train-00000.parquet", "train", rows, NUM)
        Manifest(shards=(shard,)).save(self.corpus)
        model = corpora.write_model(folder / "model", provenance={"classes": ["a", "b"]})
        self.encoder, self.pyfunc = Encoder.load(model, device="cpu"), DermRayModel(str(model))
        self.model, self.transform, self.tokenizer = factory.create(str(model))
        self.validator = Validator(self.corpus, ValidationConfig(split="train"), self.transform, self.tokenizer)
        self.num_made = 0
        self.fault: Fault

    def config(self) -> Any:
        self.num_made += 1
        return settings(self.folder / "raw", self.folder / f"out-{self.num_made}", image_size=64, min_contrast=0)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {kind: World(tmp_path_factory.mktemp(kind), kind) for kind in ("JPEG", "PNG")}


def told(run: Callable[[], Any]) -> str:
    """What it ends with, if it does not come through."""
    try:
        return "" if run() is not None else "none"
    except (ImageError, CorpusError) as error:
        return str(error)


def each(function: Callable[[bytes], Any], encoded: list[bytes]) -> int:
    """How many come through."""
    messages = [told(lambda data=data: function(data)) for data in encoded]
    assert "\n" not in "".join(messages)
    return messages.count("")


def prepared(world: World) -> int:
    (record,), _ = make(config := world.config())
    dropped = record.dropped
    assert {row.image for row in dropped} <= {"images/000.jpg"}
    assert {row.reason for row in dropped} <= {"truncated", "not_an_image"}
    assert reported(config, [record])["rows"]["dropped"] == len(dropped)
    assert record.shard is not None
    return record.shard.num_samples


def page(world: World) -> int:
    """The page of a corpus, with its pictures and those of what was dropped."""
    world.fault.on = False
    (record,), _ = make(config := world.config())
    world.fault.on = True
    assert reported(config, [record])["rows"] == {"in": 5, "in_samples": 5, "dropped": 0}
    return (Path(config.output) / report.REPORT).read_text().count("data:image/jpeg")


def readable(world: World) -> int:
    vectors, reasons = world.encoder.encode_readable(world.encoded)
    assert np.array_equal(reasons == "", np.abs(vectors).sum(1) > 0)
    return int((reasons == "").sum())


def whole_or_named(world: World) -> int:
    message = told(lambda: world.encoder.encode_images(world.encoded))
    assert not message or message.startswith("image 0: ")
    return NUM - bool(message)


def pyfunc(world: World) -> int:
    table = pd.DataFrame({"image": [*world.encoded, None], "text": [None] * NUM + ["a mole"]})
    rows = world.pyfunc.predict(table, {"classify": True}).to_dict("records")
    assert len(rows) == NUM + 1
    assert rows[-1]["error"] is None
    for row in rows[:NUM]:
        assert (row["error"] is None) == (row["embedding"] is not None) == (len(row["probabilities"]) == 2)
        assert row["error"] in (None, "truncated", "not_an_image")
    return sum(row["error"] is None for row in rows[:NUM])


def served(world: World) -> int:
    pool = DecodePool(world.encoder.preprocess, num_threads=2, max_pixels=10**6, room=NUM)
    pixels, rejections = asyncio.run(pool.decode(world.encoded))
    assert {one.reason for one in rejections} <= {"truncated", "not_an_image"}
    assert len(pixels) + len(rejections) == NUM
    return len(pixels)


def loaded(world: World) -> int:
    """A run does not go on without a sample: it ends by naming it."""
    manifest = Manifest.load(world.corpus)
    index = ShardIndex.of(world.corpus, manifest)
    views = ImageAndCaption(DataConfig(), 32, lambda texts: np.zeros((len(texts), 4), np.int32))
    decoder = Decoder(world.corpus, 0, views)
    groups, order = [unpacked(read(index, [0], views.columns)[0])], np.arange(NUM)
    message = told(lambda: decoder(0, 0, order, groups, np.zeros(NUM, int), order))
    assert not message or message.startswith(f"{world.corpus}: the image of sample {world.ids[0]} is damaged (")
    return NUM - bool(message)


def validated(world: World) -> int:
    message = told(lambda: world.validator(world.model))
    assert not message or message.startswith(f"{world.corpus}: the image of sample {world.ids[0]} is damaged (")
    return NUM - bool(message)


# How many of the images come through each way.
WAYS: dict[str, Callable[[World], int]] = {
    "inspect": lambda world: each(images.inspect, world.encoded),
    "decode": lambda world: each(images.decode, world.encoded),
    "standardise": lambda world: each(
        lambda data: images.standardise(data, image_size=64, jpeg_quality=90), world.encoded
    ),
    "encode": lambda world: each(lambda _: images.encode_jpeg(np.zeros((80, 90, 3), np.uint8), 90), world.encoded),
    "shrink": lambda world: each(lambda _: images.resize_shorter(np.zeros((80, 90, 3), np.uint8), 30), world.encoded),
    "thumbnail": lambda world: each(reporting.thumbnail, world.encoded),
    "thumbnail of an index": lambda world: each(lambda data: embed._thumbnail(data, 64), world.encoded),
    "thumbnails of an evaluation": lambda world: len(
        evaluation_report._thumbnails(Samples.load(world.corpus, "train"), range(NUM))
    ),
    "hashes": lambda world: len(
        leakage.group_hashes(ShardIndex.of(world.corpus, Manifest.load(world.corpus)), 0, [])["phash"].drop_null()
    ),
    "prepare": prepared,
    "page of prepare": page,
    "readable": readable,
    "embed": whole_or_named,
    "pyfunc": pyfunc,
    "serve": served,
    "loader": loaded,
    "validation": validated,
}


# Each call with one error and each error at one call always; the whole table takes some time.
PAIRS = [
    pytest.param(error, call, marks=() if row == column else pytest.mark.long)
    for row, error in enumerate(ERRORS)
    for column, call in enumerate(CALLS)
]


@pytest.mark.parametrize(("error", "call"), PAIRS)
def test_what_a_codec_raises_costs_one_image(
    error: type[Exception], call: str, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, kind = CALLS[call]
    world, fired = worlds[kind], {}
    real = getattr(owner, name)
    for way, run in WAYS.items():
        fault = world.fault = Fault(error("on\npurpose"), real)
        # A function, so that it is bound where it stands for a method.
        monkeypatch.setattr(owner, name, lambda *args, fault=fault, **kwargs: fault(*args, **kwargs))
        num_through = run(world)
        fired[way] = fault.fired
        assert NUM - fault.fired <= num_through <= NUM, way
    assert sum(fired.values()) >= 3, fired


@pytest.mark.parametrize("format", ["webdataset", "open_clip_csv", "parquet", "make_table", "instruct"])
def test_exports_ask_no_codec(
    format: str, worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise SystemError("on purpose")

    _export(format)(str(tmp_path / "whole"), worlds["JPEG"].folder)
    for owner, name, _ in CALLS.values():
        monkeypatch.setattr(owner, name, fail)
    _export(format)(str(tmp_path / "without"), worlds["JPEG"].folder)
    whole, without = raw_corpus.content(tmp_path / "whole"), raw_corpus.content(tmp_path / "without")
    assert len(whole) > 1
    assert whole.keys() == without.keys()
