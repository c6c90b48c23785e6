"""Training loader against a bare loop over the same shards: `python benchmarks/ingest.py`.

Both read the same row groups of a synthetic corpus (256-pixel JPEGs), decode, crop to 224 and tokenise nothing but what
the loader must. The bare loop runs in one process a core with nothing in between; it is the ceiling.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from dermray import cluster, entry, images, models
from dermray.config import ClusterConfig
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.schema import SAMPLE
from dermray.corpus.shards import ShardIndex
from dermray.ingest import augment
from dermray.ingest.loader import Loader
from dermray.ingest.settings import DataConfig

NUM_SAMPLES = 8192
ROW_GROUP_SIZE = 128
IMAGE_SIZE = 224
GLOBAL_BATCH_SIZE = 256
ROUNDS = 3


def main() -> int:
    """Measure in turn and print the median ratio."""
    num_cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        manifest = write_corpus(Path(folder))
        cluster.connect(ClusterConfig())
        with ProcessPoolExecutor(num_cores) as pool:
            bare_pass = functools.partial(run_bare, pool, folder, num_cores)
            bare_pass()
            run_loader(folder, manifest)
            ratios = []
            for _ in range(ROUNDS):
                bare = bare_pass()
                ours, first_batch_s = run_loader(folder, manifest)
                ratios.append(bare / ours)
                print(
                    f"bare loop {NUM_SAMPLES / bare:,.0f} images/s, loader {NUM_SAMPLES / ours:,.0f} images/s, "
                    f"ratio {bare / ours:.2f}, first batch after {first_batch_s:.1f} s"
                )
    print(f"median ratio {np.median(ratios):.2f} on {num_cores} cores")
    return 0


def run_bare(pool: ProcessPoolExecutor, folder: str, num_cores: int) -> float:
    """Seconds that the bare loop takes on all cores."""
    started = time.perf_counter()
    list(pool.map(bare_loop, [folder] * num_cores, range(num_cores), [num_cores] * num_cores))
    return time.perf_counter() - started


def write_corpus(folder: Path) -> Manifest:
    """Samples of 256 x 340 pixels that compress like photographs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    encoded = [images.encode_jpeg(photograph(random), 90) for _ in range(256)]
    rows = [
        {
            "sample_id": f"{i:032x}", "image": encoded[i % 256], "width": 340, "height": 256,
            "captions": [{"aspect": "raw", "text": f"a red scaly plaque on the forearm, number {i}"}],
            "labels": [], "concepts": [], "skin_type": None, "source": "bench", "source_id": str(i), "meta": None,
            "split": "train",
        }
        for i in range(NUM_SAMPLES)
    ]  # fmt: skip
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE), path, row_group_size=ROW_GROUP_SIZE, compression="none")
    groups = (ROW_GROUP_SIZE,) * (NUM_SAMPLES // ROW_GROUP_SIZE)
    shard = Shard(
        path=path.name, split="train", num_samples=NUM_SAMPLES, num_bytes=1, sha256="0" * 64, row_groups=groups
    )
    manifest = Manifest(shards=(shard,))
    manifest.save(str(folder))
    return manifest


def photograph(random: np.random.Generator) -> np.ndarray:
    """A smooth picture with some grain, uint8 `[256, 340, 3]`."""
    coarse = random.integers(60, 220, (8, 10, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (340, 256), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def bare_loop(folder: str, part: int, parts: int) -> int:
    """Decode and crop every `parts`-th row group in this process."""
    cv2.setNumThreads(1)
    index = ShardIndex.of(folder, Manifest.load(folder))
    done = 0
    for group in range(part, len(index.locations), parts):
        for position, data in enumerate(index.read_row_group(group, ["image"])["image"]):
            random = augment.generator(0, 0, group * ROW_GROUP_SIZE + position)
            image = images.decode(data.as_py())
            augment.crop_and_resize(image, random, size=IMAGE_SIZE, scale=(0.4, 1.0), horizontal_flip=0.0)
            done += 1
    return done


def run_loader(folder: str, manifest: Manifest) -> tuple[float, float]:
    """Seconds for one epoch, the start included; seconds to the first batch."""
    loader = Loader(
        corpus=folder,
        manifest=manifest,
        settings=DataConfig(),
        image_size=IMAGE_SIZE,
        tokenizer=functools.partial(models.tokenizer, "ViT-B-16"),
        seed=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        rank=0,
        world_size=1,
        num_steps=NUM_SAMPLES // GLOBAL_BATCH_SIZE,
    )
    started = time.perf_counter()
    for position, _ in enumerate(loader.batches()):
        if position == 0:
            first = time.perf_counter() - started
    return time.perf_counter() - started, first


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
