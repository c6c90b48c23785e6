"""Preparation against a bare loop and Pillow in a pool: `python benchmarks/prepare.py [--size small|large|tiny]`.

Draws photographs (24,576 of 600 x 450 pixels, 500 of 12 megapixels, or 24,576 of 300 x 225 where asked, all different),
then in turn: the whole graph of `prepare` on all cores (read the table, decode, resize, encode, hash, samples, shards,
duplicates, report); before and after it a bare loop of decode, resize and encode in one Python process; the same loop
in a process that keeps its freed memory as the graph's workers do (`images.use_one_core`), alone and in as many
processes as there are cores; and the plainest alternative, Pillow in a `multiprocessing.Pool` that writes the same
images into Parquet. Prints the graph's images/s over the bare loop's times the cores, over the settled loop's times the
cores, over all settled loops side by side (what the machine can give), and over the pool's. The cluster is started
before the clock.

With `--memory N` it prepares N small images in a fresh process instead, and prints the peak memory of the driver and of
the object store. With `--tasks N` it prepares N images (small ones, or of `--size`) in turn on Ray Data's pool of
actors, as `prepare` does, and by plain Ray tasks in a window, with the bare loop before them; it prints images/s, and
the processor time an image of the driver and of Ray's processes together, which says more where the machine is shared.
With `--start N` it has N empty pieces done by both, and prints the seconds, and the processor time that a worker of Ray
Data's pool has spent when its first piece comes, beside that of the imports alone.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image, ImageOps

from dermray import cluster, entry, images, pieces
from dermray.config import ClusterConfig
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig

IMAGE_SIZE, JPEG_QUALITY = 256, 90
# Width, height, number, and samples a shard: enough shards for every core to be busy until the end.
SIZES = {"tiny": (300, 225, 24_576, 512), "small": (600, 450, 24_576, 512), "large": (4000, 3000, 500, 32)}
BARE_SHARE, POOL_SHARE = 8, 8
CHUNK = 64


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="only these photographs")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--memory", type=int, metavar="N", help="peak memory at so many images instead")
    parser.add_argument("--tasks", type=int, metavar="N", help="Ray Data against plain tasks at so many images instead")
    parser.add_argument("--start", type=int, metavar="N", help="the start of Ray Data at so many empty pieces instead")
    options = parser.parse_args()
    cluster.connect(ClusterConfig())
    if options.start:
        return measure_start(options.start, options.rounds)
    if options.tasks:
        return compare_tasks(options.size or "small", options.tasks, options.rounds)
    if options.memory:
        return measure_memory(options.memory)
    for size in [options.size] if options.size else ("small", "large"):
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            compare(size, Path(folder) / "raw", options.rounds)
    return 0


def compare(size: str, raw: Path, rounds: int) -> None:
    """Rounds of the five, and the medians of the ratios."""
    width, height, number, rows_per_shard = SIZES[size]
    num_cores = os.cpu_count() or 1
    name = f"{number:,} of {width} x {height}"
    write(raw, width, height, number)
    warm_up(raw, num_cores, rows_per_shard)
    ratios = []
    for _ in range(rounds):
        before = run_bare(raw, number // BARE_SHARE, 1)
        graph = run_graph(raw, number, rows_per_shard)
        bare = (before + run_bare(raw, number // BARE_SHARE, 1)) / 2
        settled = run_bare(raw, number // BARE_SHARE, 1, images.use_one_core)
        together = run_bare(raw, number // BARE_SHARE, num_cores, images.use_one_core)
        pool = run_pool(raw, number // POOL_SHARE, num_cores)
        ratios.append((graph / (bare * num_cores), graph / (settled * num_cores), graph / together, graph / pool))
        print(
            f"{name}: graph {graph:,.0f} images/s; bare loop {bare:,.0f}, settled {settled:,.0f}, {num_cores} settled "
            f"side by side {together:,.0f}; Pillow pool {pool:,.0f}; graph over {_told(ratios[-1])}",
            flush=True,
        )
    print(f"{name}: median over {_told(np.median(ratios, axis=0).tolist())}")


def _told(ratios: Sequence[float]) -> str:
    over_bare, over_settled, over_together, over_pool = ratios
    return (
        f"bare x cores {over_bare:.2f}, settled x cores {over_settled:.2f}, settled side by side {over_together:.2f}, "
        f"pool {over_pool:.2f}"
    )


def write(raw: Path, width: int, height: int, number: int) -> None:
    """`metadata.csv` and so many different photographs."""
    raw.mkdir()
    random = np.random.default_rng(0)
    grain = random.normal(0, 8, (height, width, 3)).astype(np.int16)
    coarse = random.integers(60, 220, (number, 8, 10, 3)).astype(np.uint8)

    def draw(position: int) -> None:
        smooth = cv2.resize(coarse[position], (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        picture = np.clip(cv2.add(smooth, grain), 0, 255).astype(np.uint8)
        (raw / f"{position:06d}.jpg").write_bytes(images.encode_jpeg(picture, 90))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(number)))
    with (raw / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        table = csv.writer(sink)
        table.writerow(["image", "caption", "label"])
        for position in range(number):
            table.writerow([f"{position:06d}.jpg", f"a red scaly plaque, number {position}", "psoriasis"])


def warm_up(raw: Path, num_cores: int, rows_per_shard: int) -> None:
    """Start worker processes and fill the page cache."""
    with quiet():
        run(raw, limit=2 * num_cores * rows_per_shard, rows_per_shard=rows_per_shard // 2)
    for file in raw.glob("*.jpg"):
        file.read_bytes()


def run_graph(raw: Path, number: int, rows_per_shard: int) -> float:
    """Images/s of the whole of `prepare`."""
    with quiet():
        started = time.perf_counter()
        run(raw, rows_per_shard=rows_per_shard)
        return number / (time.perf_counter() - started)


def run(raw: Path, *, rows_per_shard: int, limit: int | None = None) -> None:
    """Prepare into a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as output:
        prepare(
            PrepareConfig(
                source="csv", input=str(raw), output=f"{output}/corpus", image_size=IMAGE_SIZE,
                jpeg_quality=JPEG_QUALITY, limit=limit, rows_per_shard=rows_per_shard,
            )
        )  # fmt: skip


def compare_tasks(size: str, number: int, rounds: int) -> int:
    """Rounds of Ray Data and plain tasks, each first every other time, and the medians of their ratios."""
    width, height, _, rows_per_shard = SIZES[size]
    num_cores = os.cpu_count() or 1
    ratios = []
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        raw = Path(folder) / "raw"
        write(raw, width, height, number)
        warm_up(raw, num_cores, rows_per_shard)
        sides = {"Ray Data": pieces.run, "plain tasks": run_plain}
        for round_number in range(rounds):
            bare = run_bare(raw, number // BARE_SHARE, 1, images.use_one_core) * num_cores
            speeds, spent, told = {}, {}, [f"bare loop x cores {bare:,.0f} images/s"]
            for name in list(sides)[:: -1 if round_number % 2 else 1]:
                with mock.patch.object(pieces, "run", sides[name]), ProcessorTime() as time_spent:
                    speeds[name] = run_graph(raw, number, rows_per_shard)
                spent[name] = time_spent.seconds
                told.append(f"{name} {speeds[name]:,.0f} images/s, {1000 * spent[name] / number:.2f} core-ms an image")
            ratios.append(
                (speeds["Ray Data"] / speeds["plain tasks"], spent["plain tasks"] / spent["Ray Data"],
                 speeds["Ray Data"] / bare)
            )  # fmt: skip
            print(f"{number:,} of {width} x {height}: {'; '.join(told)}; {_over(ratios[-1])}", flush=True)
    print(f"median: {_over(np.median(ratios, axis=0).tolist())}")
    return 0


def measure_start(number: int, rounds: int) -> int:
    """Rounds of empty pieces on Ray Data's pool, as large as that of a preparation, and by plain tasks."""
    imports = {each: imported(each) for each in ("ray", "ray.data", "dermray.pieces")}
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in imports.items())
    print(f"core-seconds of a fresh process until it has imported: {told}", flush=True)
    cores = PrepareConfig.model_fields["cpus_per_task"].default
    pool = pieces.Pool(noun="piece", operator="empty", needs={"CPU": cluster.cpus_of_cores(cores)})
    empty = {str(each): each for each in range(number)}
    for _ in range(rounds):
        took = {}
        for name, run_pieces in (("Ray Data", pieces.run), ("plain tasks", run_plain)):
            started = time.perf_counter()
            spent: dict[int, float] = {}
            for _, (worker, seconds) in run_pieces(empty, spend_nothing, pool):
                spent.setdefault(worker, seconds)
            took[name] = time.perf_counter() - started
            if name == "Ray Data":
                workers = ", ".join(f"{seconds:.2f}" for seconds in spent.values())
        print(
            f"{number} empty pieces: Ray Data {took['Ray Data']:.2f} s (core-seconds of each worker: {workers}), "
            f"plain tasks {took['plain tasks']:.2f} s",
            flush=True,
        )
    return 0


def imported(module: str) -> float:
    """Processor time that a fresh process of Python spends until it has a module."""
    code = f"import {module}, resource; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def spend_nothing(_: Any) -> tuple[int, float]:
    """The worker, and the processor time that it has spent until now."""
    return os.getpid(), sum(psutil.Process().cpu_times()[:2])


def _over(ratios: Sequence[float]) -> str:
    speed, work, bare = ratios
    return f"Ray Data over plain tasks {speed:.3f}, by processor time {work:.3f}, over the bare loop {bare:.2f}"


class ProcessorTime:
    """Processor time that this process and all of Ray's on the machine have spent inside the block, in seconds.

    Workers come and go, and nobody is told their times when they end, so all are looked at twice a second: of a worker
    that ends, at most half a second is missed.
    """

    def __init__(self) -> None:
        self._spent: dict[tuple[int, float], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """What was spent until the end of the block."""
        return sum(self._spent.values()) - self._before

    def __enter__(self) -> ProcessorTime:
        self._look()
        self._before = sum(self._spent.values())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._look()

    def _look(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if process.pid == os.getpid() or "ray::" in line or "/ray/" in line:
                    self._spent[process.pid, process.create_time()] = sum(process.cpu_times()[:2])


def run_plain(
    todo: Mapping[str, Any], work: Callable[[Any], Any], pool: pieces.Pool, **_: object
) -> Iterator[tuple[str, Any]]:
    """In the place of `pieces.run`: a plain task a piece, two of them handed out for each that can be at work."""
    task = ray.remote(do_plain).options(name=pool.operator, num_cpus=pool.needs["CPU"])
    kept = ray.put(work)
    left, running = dict(todo), dict[ray.ObjectRef, str]()
    while left or running:
        while left and len(running) < 2 * pool.num_workers(len(todo)):
            name = next(iter(left))
            running[task.remote(left.pop(name), kept)] = name
        (done,), _others = ray.wait(list(running))
        yield running.pop(done), ray.get(done)


def do_plain(piece: Any, work: Callable[[Any], Any]) -> Any:
    """Ray's side of a plain task."""
    return work(piece)


def use_one_thread() -> None:
    """All that a bare process is told."""
    cv2.setNumThreads(1)


def run_bare(raw: Path, number: int, num_processes: int, settle: Callable[[], None] = use_one_thread) -> float:
    """Images/s of decode, resize and encode with nothing around it, in so many processes side by side."""
    files = [str(file) for file in sorted(raw.glob("*.jpg"))[:number]]
    parts = [files[part::num_processes] for part in range(num_processes)]
    with multiprocessing.get_context("spawn").Pool(num_processes, settle) as pool:
        pool.map(bare_loop, [files[:8]] * num_processes, chunksize=1)
        started = time.perf_counter()
        pool.map(bare_loop, parts, chunksize=1)
        return number / (time.perf_counter() - started)


def bare_loop(files: list[str]) -> None:
    """Decode, resize, encode."""
    for file in files:
        pixels = images.resize_shorter(images.decode(Path(file).read_bytes(), shorter_side=IMAGE_SIZE), IMAGE_SIZE)
        images.encode_jpeg(pixels, JPEG_QUALITY)


def run_pool(raw: Path, number: int, num_cores: int) -> float:
    """Images/s of Pillow in a pool of processes."""
    files = sorted(str(file) for file in raw.glob("*.jpg"))[:number]
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
    """Prepare so many images and print the peaks of this process, and of its cluster's object store."""
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
