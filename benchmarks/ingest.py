"""Training loader against open_clip's, and against a bare decode loop: `python benchmarks/ingest.py [part …]`.

Parts are `open_clip`, `bare` and `memory`; all of them unless some are named. The first batch is told always.

One set of synthetic photographs of 600 x 450 pixels, as files with a CSV table for `open_clip_train`, and prepared in
shards of 256-pixel JPEGs for DermRay. Three sides take turns, each with as many decoding processes as there are cores,
start included:

- open_clip: its `CsvDataset` in a torch DataLoader, with DermLIP's augmentation on PIL images in the processes.
- DermRay, trained on: the loader, then colours and normalisation on the training device, here the CPU. The same recipe.
- DermRay, loader alone, against a bare loop in a process a core, which reads the same row groups, decodes and crops
  them, and hands over nothing: the ceiling.

Then the time to the first batch in a training worker's place, and memory over two epochs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import psutil
import ray
import torch

from dermray import cluster, entry, images, models, storage
from dermray.config import ClusterConfig
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.schema import SAMPLE
from dermray.corpus.shards import ShardIndex
from dermray.ingest import augment
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Loader
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import portable
from dermray.train.objectives.contrastive.views import ImageAndCaption

NUM_SAMPLES = 32768
NUM_ORIGINALS = 1024
NUM_PHOTOGRAPHS = 256
ROW_GROUP_SIZE = 64
IMAGE_SIZE = 224
GLOBAL_BATCH_SIZE = 256
PARTS = ("open_clip", "bare", "memory")
ROUNDS = 3
TIMEOUT_S = 120
# A cluster's own processes go on starting for a while after it answers.
SETTLE_S = 5
MODEL = "ViT-B-16"
# An own cluster counts a core as two CPUs.
RECIPE = DataConfig(cpus_per_task=2.0, crop_scale=(0.4, 1.0), color_jitter=(0.32, 0.32, 0.32, 0.08), grayscale_prob=0.2)
VOCABULARY = (
    "a red scaly plaque on the forearm with silvery scale and pruritus patient reports onset three weeks ago diagnosis "
    "psoriasis vulgaris biopsy showed acanthosis parakeratosis treatment topical corticosteroid erythema lesion margin"
)
MEAN_WORDS = 41
# What another does and what we do, in images a second.
Pair = tuple[Callable[[], float], Callable[[], float]]


def main() -> int:
    """Measure the parts named on the command line, or all; print median ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    parts = parser.parse_args().parts
    num_cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        table, manifest = write_inputs(Path(folder))
        # Spawned: a process forked beside the threads of Ray or OpenCV may wait for a lock that nobody holds.
        spawned = get_context("spawn")
        with ProcessPoolExecutor(num_cores, spawned) as pool, ProcessPoolExecutor(1, spawned) as theirs:
            pairs: dict[str, Pair] = {
                "open_clip": (
                    lambda: NUM_ORIGINALS / run_open_clip(theirs, table, num_cores),
                    lambda: NUM_SAMPLES / run_loader(folder, manifest, augmented=True),
                ),
                "bare": (
                    lambda: NUM_SAMPLES / run_bare(pool, folder, num_cores),
                    lambda: NUM_SAMPLES / run_loader(folder, manifest),
                ),
            }
            pairs = {name: pair for name, pair in pairs.items() if name in parts}
            for other, _ in pairs.values():
                other()
            cluster.connect(ClusterConfig())
            time.sleep(SETTLE_S)
            # Also so that no side begins with processes that have to start.
            tell_first_batch(folder, manifest)
            compare(pairs)
        if "memory" in parts:
            report_memory(folder, manifest)
    return 0


def compare(pairs: dict[str, Pair]) -> None:
    """Run the sides of all pairs in turn; each returns images a second."""
    ratios: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(ROUNDS):
        for name, (other, ours) in pairs.items():
            rates = other(), ours()
            ratios[name].append(rates[1] / rates[0])
            print(f"{name} {rates[0]:,.0f} images/s, ours {rates[1]:,.0f}: {ratios[name][-1]:.2f}", flush=True)
    for name, found in ratios.items():
        print(f"median of {ROUNDS} on {os.cpu_count()} cores: {np.median(found):.2f} of {name}", flush=True)


def tell_first_batch(folder: str, manifest: Manifest) -> None:
    print(f"first batch, no process warm: {first_batch_s(folder, manifest):.1f} s")
    in_worker = ray.get(ray.remote(num_cpus=0.5)(first_batch_s).remote(folder, manifest))
    print(f"first batch in a worker that holds half a CPU: {in_worker:.1f} s", flush=True)


def write_inputs(folder: Path) -> tuple[Path, Manifest]:
    """Originals with their table, and the prepared corpus, of the same photographs and captions."""
    random = np.random.default_rng(0)
    originals = [images.encode_jpeg(photograph(random), 90) for _ in range(NUM_PHOTOGRAPHS)]
    words = VOCABULARY.split()
    texts = [" ".join(random.choice(words, random.poisson(MEAN_WORDS - 1) + 1)) for _ in range(NUM_ORIGINALS)]
    lines = ["filepath\ttitle"]
    for number in range(NUM_ORIGINALS):
        path = folder / f"{number}.jpg"
        path.write_bytes(originals[number % NUM_PHOTOGRAPHS])
        lines.append(f"{path}\t{texts[number]}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines))
    prepared = [images.standardise(data, image_size=256, jpeg_quality=90) for data in originals]
    return table, write_corpus(folder, prepared, texts)


def photograph(random: np.random.Generator) -> np.ndarray:
    """A smooth picture with some grain, uint8 `[450, 600, 3]`."""
    coarse = random.integers(60, 220, (8, 10, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (600, 450), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    grain = cv2.GaussianBlur(random.normal(0, 8, smooth.shape).astype(np.float32), (3, 3), 0)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def write_corpus(folder: Path, prepared: list[images.StandardImage], texts: list[str]) -> Manifest:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "sample_id": f"{i:032x}", "image": prepared[i % NUM_PHOTOGRAPHS].jpeg, "width": 341, "height": 256,
            "captions": [{"aspect": "raw", "text": texts[i % NUM_ORIGINALS]}],
            "labels": [], "concepts": [], "skin_type": None, "source": "bench", "source_id": str(i), "meta": None,
            "split": "train",
        }
        for i in range(NUM_SAMPLES)
    ]  # fmt: skip
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE), path, row_group_size=ROW_GROUP_SIZE, compression="none")
    groups = (ROW_GROUP_SIZE,) * (NUM_SAMPLES // ROW_GROUP_SIZE)
    shard = Shard(
        path=path.name, split="train", num_samples=NUM_SAMPLES, num_bytes=path.stat().st_size,
        sha256=storage.sha256(path), row_groups=groups,
    )  # fmt: skip
    manifest = Manifest(shards=(shard,))
    manifest.save(str(folder))
    return manifest


def run_open_clip(pool: ProcessPoolExecutor, table: Path, num_processes: int) -> float:
    """Seconds that open_clip's loader takes for one pass over the originals."""
    return pool.submit(open_clip_loop, table, num_processes).result(TIMEOUT_S)


def open_clip_loop(table: Path, num_processes: int) -> float:
    """The same, in a process that forks the DataLoader's."""
    import open_clip
    from open_clip.transform import AugmentationCfg, image_transform
    from open_clip_train.data import get_csv_dataset

    augmentation = AugmentationCfg(
        scale=RECIPE.crop_scale,
        color_jitter=RECIPE.color_jitter,
        color_jitter_prob=RECIPE.color_jitter_prob,
        gray_scale_prob=RECIPE.grayscale_prob,
    )
    args = SimpleNamespace(
        train_data=str(table), csv_img_key="filepath", csv_caption_key="title", csv_separator="\t", distributed=False,
        batch_size=GLOBAL_BATCH_SIZE, workers=num_processes,
    )  # fmt: skip
    transform = image_transform(IMAGE_SIZE, is_train=True, aug_cfg=augmentation)
    data = get_csv_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer(MODEL))
    started = time.perf_counter()
    done = sum(len(pixels) for pixels, _ in data.dataloader)
    assert done == NUM_ORIGINALS
    return time.perf_counter() - started


def run_bare(pool: ProcessPoolExecutor, folder: str, num_cores: int) -> float:
    """Seconds that the bare loop takes on all cores."""
    started = time.perf_counter()
    parts = range(num_cores)
    list(pool.map(bare_loop, [folder] * num_cores, parts, [num_cores] * num_cores, timeout=TIMEOUT_S))
    return time.perf_counter() - started


def bare_loop(folder: str, part: int, parts: int) -> int:
    """Decode and crop every `parts`-th row group in this process."""
    cv2.setNumThreads(1)
    index = ShardIndex.of(folder, Manifest.load(folder))
    done = 0
    for group in range(part, len(index.locations), parts):
        for position, data in enumerate(index.read_row_group(group, ["image"])["image"]):
            random = augment.generator(0, 0, group * ROW_GROUP_SIZE + position)
            image = images.decode(data.as_py())
            augment.crop_and_resize(image, random, size=IMAGE_SIZE, scale=RECIPE.crop_scale, horizontal_flip=0.0)
            done += 1
    return done


def make_loader(folder: str, manifest: Manifest) -> Loader:
    return Loader(
        corpora=Corpora.of(folder, manifest),
        settings=RECIPE,
        views=ImageAndCaption(RECIPE, IMAGE_SIZE, portable(functools.partial(models.tokenizer, MODEL))),
        seed=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        rank=0,
        world_size=1,
        num_steps=NUM_SAMPLES // GLOBAL_BATCH_SIZE,
    )


def run_loader(folder: str, manifest: Manifest, *, augmented: bool = False) -> float:
    """Seconds for one epoch; `augmented`: with what training does to a batch on the device."""
    loader = make_loader(folder, manifest)
    color = ColorAugmentation(RECIPE, seed=0)
    mean, std = torch.full((1, 3, 1, 1), 122.0), torch.full((1, 3, 1, 1), 68.0)
    # As the worker of a training without GPU does.
    images.use_one_core()
    started = time.perf_counter()
    for batch in loader.batches():
        if augmented:
            pixels = (
                color(batch["pixels"].permute(0, 3, 1, 2), epoch=batch.epoch, samples=batch.draws).sub_(mean).div_(std)
            )
            assert pixels.shape == (GLOBAL_BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    return time.perf_counter() - started


def first_batch_s(folder: str, manifest: Manifest) -> float:
    """Seconds from a loader at hand to its first batch."""
    batches = make_loader(folder, manifest).batches()
    started = time.perf_counter()
    next(batches)
    elapsed = time.perf_counter() - started
    batches.close()
    return elapsed


def report_memory(folder: str, manifest: Manifest) -> None:
    """Memory of this process and Ray's, and of the object store, four times in each of two epochs."""
    loader = make_loader(folder, manifest)
    quarter = loader.num_steps // 4
    loader.num_steps *= 2
    for step, _ in enumerate(loader.batches(), 1):
        if step % quarter == 0:
            private, used, touched = memory_mb()
            print(
                f"memory after step {step}: {private:,.0f} MB of processes; object store {used:,.0f} MB in use, "
                f"{touched:,.0f} MB ever used",
                flush=True,
            )


def memory_mb() -> tuple[float, float, float]:
    """Private memory of this process and all of its children; what is in the object store, and what it has touched.

    In 10^6 bytes.
    """
    from ray._private.internal_api import node_stats

    own = psutil.Process()
    private = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            private += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    node = ray.nodes()[0]
    stats: Any = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    used = stats.store_stats.object_store_bytes_used
    return private / 1e6, used / 1e6, psutil.disk_usage("/dev/shm").used / 1e6


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
