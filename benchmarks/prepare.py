"""Preparation against a bare loop and against Pillow in a pool: `python benchmarks/prepare.py [--memory]`.

Draws photographs (6,000 of 600 x 450 pixels and 500 of 12 megapixels, all different), then in turn, for each size:
the whole graph of `prepare` on all cores (read, decode, resize, encode, hash, samples, shards, duplicates, report);
a bare loop of decode, resize and encode in one process; and the plainest alternative, Pillow in a
`multiprocessing.Pool` that writes the same images into Parquet. Prints the graph's images/s over the bare loop's times
the cores, and over the pool's. The cluster is started before the clock.

With `--memory` it prepares 5,000 and 50,000 small images instead, each in a fresh process, and prints the peak memory
of the driver and of the object store.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from dermray import cluster, entry, images
from dermray.config import ClusterConfig
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig

IMAGE_SIZE, JPEG_QUALITY = 256, 90
SIZES = {"600 x 450": (600, 450, 6000), "12 megapixels": (4000, 3000, 500)}
ROUNDS = 3
BARE_SHARE = 4
CHUNK = 64


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory at 5,000 and 50,000 images")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure_memory(options.measure)
    if options.memory:
        for number in (5_000, 50_000):
            subprocess.run([sys.executable, __file__, "--measure", str(number)], check=True)
        return 0
    num_cores = os.cpu_count() or 1
    cluster.connect(ClusterConfig())
    for name, (width, height, number) in SIZES.items():
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            raw = Path(folder) / "raw"
            write(raw, width, height, number)
            compare(name, raw, number, num_cores)
    return 0


def compare(name: str, raw: Path, number: int, num_cores: int) -> None:
    """Rounds of the three, and the medians of the ratios."""
    warm_up(raw, num_cores)
    over_bare, over_pool = [], []
    for _ in range(ROUNDS):
        bare = run_bare(raw, number // BARE_SHARE)
        graph = run_graph(raw, number)
        pool = run_pool(raw, num_cores)
        over_bare.append(graph / (bare * num_cores))
        over_pool.append(graph / pool)
        print(
            f"{name}: graph {graph:,.0f} images/s, bare loop {bare:,.0f} x {num_cores} cores, Pillow pool {pool:,.0f}; "
            f"graph over bare x cores {over_bare[-1]:.2f}, over pool {over_pool[-1]:.2f}",
            flush=True,
        )
    print(f"{name}: median over bare x cores {np.median(over_bare):.2f}, over pool {np.median(over_pool):.2f}")


def write(raw: Path, width: int, height: int, number: int) -> None:
    """`metadata.csv` and so many different photographs."""
    raw.mkdir()
    random = np.random.default_rng(0)
    grain = random.normal(0, 8, (height, width, 3)).astype(np.int16)
    with (raw / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        table = csv.writer(sink)
        table.writerow(["image", "caption", "label"])
        for position in range(number):
            coarse = random.integers(60, 220, (8, 10, 3)).astype(np.uint8)
            smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
            picture = np.clip(cv2.add(smooth, grain), 0, 255).astype(np.uint8)
            (raw / f"{position:06d}.jpg").write_bytes(images.encode_jpeg(picture, 90))
            table.writerow([f"{position:06d}.jpg", f"a red scaly plaque, number {position}", "psoriasis"])


def warm_up(raw: Path, num_cores: int) -> None:
    """Start worker processes and fill the page cache."""
    with quiet():
        run(raw, limit=200 * num_cores)
    for file in raw.glob("*.jpg"):
        file.read_bytes()


def run_graph(raw: Path, number: int) -> float:
    """Images/s of the whole of `prepare`."""
    with quiet():
        started = time.perf_counter()
        run(raw)
        return number / (time.perf_counter() - started)


def run(raw: Path, limit: int | None = None, rows_per_shard: int = 128) -> None:
    """Prepare into a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as output:
        prepare(
            PrepareConfig(
                source="csv", input=str(raw), output=f"{output}/corpus", image_size=IMAGE_SIZE,
                jpeg_quality=JPEG_QUALITY, limit=limit, rows_per_shard=rows_per_shard,
            )
        )  # fmt: skip


def run_bare(raw: Path, number: int) -> float:
    """Images/s of decode, resize and encode with nothing around it, in this process alone."""
    cv2.setNumThreads(1)
    files = sorted(raw.glob("*.jpg"))[:number]
    started = time.perf_counter()
    for file in files:
        pixels = images.resize_shorter(images.decode(file.read_bytes(), shorter_side=IMAGE_SIZE), IMAGE_SIZE)
        images.encode_jpeg(pixels, JPEG_QUALITY)
    return len(files) / (time.perf_counter() - started)


def run_pool(raw: Path, num_cores: int) -> float:
    """Images/s of Pillow in a pool of processes."""
    files = sorted(str(file) for file in raw.glob("*.jpg"))
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as output:
        jobs = [(chunk, f"{output}/{number:05d}.parquet") for number, chunk in enumerate(chunks)]
        with multiprocessing.get_context("spawn").Pool(num_cores) as pool:
            pool.map(abs, range(num_cores))
            started = time.perf_counter()
            pool.starmap(pillow_chunk, jobs, chunksize=1)
            return len(files) / (time.perf_counter() - started)


def pillow_chunk(files: list[str], output: str) -> None:
    """Files → one Parquet file of JPEGs, by Pillow alone."""
    rows = []
    for file in files:
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        scale = IMAGE_SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=JPEG_QUALITY)
        rows.append({"source_id": file, "image": sink.getvalue(), "width": image.width, "height": image.height})
    pq.write_table(pa.Table.from_pylist(rows), output, compression="NONE")


def measure_memory(number: int) -> int:
    """Prepare so many images in this process and print the peaks."""
    cluster.connect(ClusterConfig())
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        raw = Path(folder) / "raw"
        write(raw, 200, 150, number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with quiet(), SharedMemory() as store:
            run(raw, rows_per_shard=512)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{number:,} images: driver peak {after / 1024:,.0f} MB ({before / 1024:,.0f} MB before), "
        f"object store peak {store.peak / 2**20:,.0f} MB"
    )
    return 0


class SharedMemory:
    """Peak use of /dev/shm, where the object store lies, above what was there."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._before = shutil.disk_usage("/dev/shm").used
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> SharedMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, shutil.disk_usage("/dev/shm").used - self._before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress of `prepare`."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
