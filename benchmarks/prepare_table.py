"""A table of Derm1M's size, read, resolved and planned without an image: `python benchmarks/prepare_table.py`.

Writes a table of 1,029,761 rows in the layout of Derm1M's v2 release (captions of 41 words on average, a tree of four
levels, file names that tell their group) and a disease tree, then in a fresh process reads it, makes the plan and hands
the rows of every shard out to workers of Ray Data, which resolve their labels against the tree. Prints the seconds of
each part, the core-seconds of the driver and of the workers, and the driver's peak memory: its own, and with the pages
of files and of Ray's store that it had touched. With `--input FOLDER` the rows and the tree of a real release are
repeated instead; with `--driver-alone` no task reads the table, with `--plan-only` nothing is handed out; `--arrays`
says too how many bytes a row NumPy's arrays and Python's objects come to at most while it plans, which takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

NUM_ROWS = 1_029_761
COLUMNS = (
    "filename", "caption", "truncated_caption", "source", "source_type", "disease_label",
    "hierarchical_disease_label", "skin_concept", "body_location", "symptoms", "age", "gender",
)  # fmt: skip
TABLE_NAME = "Derm1M_v2_pretrain.csv"
NAMES = (
    "youtube/clip{g}_frame_{n}_0.jpg",
    "IIYI/{g}_{n}.png",
    "pubmed/{n}_PMC{g}.jpg",
    "edu/atlas_{g:05d}_{n:05d}.jpg",
)


def main() -> int:
    """Write the table, measure in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="folder of a real release whose rows and tree are repeated")
    parser.add_argument("--num-rows", type=int, nargs="+", default=[NUM_ROWS])
    parser.add_argument("--driver-alone", action="store_true", help="no task reads the table")
    parser.add_argument("--plan-only", action="store_true", help="hand nothing out")
    parser.add_argument("--arrays", action="store_true", help="trace what planning allocates")
    parser.add_argument("--measure", type=Path, help="only measure the folder that was written")
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.driver_alone, options.plan_only, options.arrays)
    peaks: list[float] = []
    for num_rows in options.num_rows:
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            write(Path(folder), num_rows, options.input)
            flags = ["--driver-alone"] * options.driver_alone + ["--plan-only"] * options.plan_only
            flags += ["--arrays"] * options.arrays
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run([*command, *flags], check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1] if done.stdout else "", flush=True)
        if done.returncode:
            return done.returncode
        peaks.append(float(done.stdout.rpartition("peak memory of its own ")[2].split()[0]))
    for first, second in itertools.pairwise(zip(options.num_rows, peaks, strict=True)):
        growth = (second[1] - first[1]) * 1e9 / (second[0] - first[0])
        print(f"from {first[0]:,} to {second[0]:,} rows the peak grows by {growth:.0f} bytes a row")
    return 0


def write(folder: Path, num_rows: int, real: Path | None) -> None:
    """The table and its tree."""
    tree = json.loads((real / "ontology.json").read_text(encoding="utf-8")) if real else synthetic_tree()
    (folder / "ontology.json").write_text(json.dumps(tree), encoding="utf-8")
    rows = real_rows(real) if real else synthetic_rows(tree)
    base = [next(rows) for _ in range(5000)]
    with (folder / TABLE_NAME).open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(COLUMNS)
        for number in range(num_rows):
            name = NAMES[number % len(NAMES)].format(g=number // 12, n=number)
            writer.writerow([name, *base[number % len(base)]])


def real_rows(folder: Path) -> Iterator[list[str]]:
    """The rows of a real table without their file names, over and over."""
    with (folder / TABLE_NAME).open(encoding="utf-8-sig", newline="") as file:
        rows = [[row[name] for name in COLUMNS[1:]] for row in csv.DictReader(file)]
    while True:
        yield from rows


def synthetic_tree() -> dict[str, list[str]]:
    """4 x 4 x 5 x 5 nodes: four levels, 400 conditions."""
    tree: dict[str, list[str]] = {"root": []}

    def grow(parent: str, widths: tuple[int, ...], name: str) -> None:
        for number in range(widths[0] if widths else 0):
            child = (
                f"{name}{'abcde'[number]}osis"
                if len(widths) > 1
                else f"{name}{'abcde'[number]}itis, morbus {name}{number}"
            )
            tree.setdefault(parent, []).append(child)
            grow(child, widths[1:], f"{name}{'abcde'[number]}")

    grow("root", (4, 4, 5, 5), "derm")
    return tree


def synthetic_rows(tree: dict[str, list[str]]) -> Iterator[list[str]]:
    """Cells of a row without its file name."""
    random = np.random.default_rng(0)
    leaves = [child for below in tree.values() for child in below if child not in tree]
    stems = ("plaque", "papule", "macule", "lesion", "patch", "scale", "border", "crust")
    words = [stem + ending for stem in stems for ending in ("", "s", " on the arm", " of the skin", " with erythema")]
    while True:
        caption = ". ".join(
            " ".join(random.choice(words, size=4)).capitalize() for _ in range(max(1, int(random.normal(4.5, 2))))
        )
        label = str(random.choice(leaves)).partition(",")[0]
        concept = "erythema, scale" if random.random() < 0.5 else "No visual concepts"
        age = f"{random.integers(1, 90)}" if random.random() < 0.3 else "No age information"
        yield [
            caption, caption, "atlas", "knowledge", label, "", concept, "forearm", "No symptom information", age,
            "No gender information",
        ]  # fmt: skip


def measure(folder: Path, driver_alone: bool, plan_only: bool, arrays: bool) -> int:
    """What the driver does before an image is read, the handing out of the shards' rows included."""
    from dermray import cluster
    from dermray.config import ClusterConfig
    from dermray.prepare.pipeline import read
    from dermray.prepare.settings import PrepareConfig
    from dermray.raw.sources import tables

    if driver_alone:
        tables.TASKS_FROM_BYTES = sys.maxsize
    traced = trace_plan() if arrays else []
    if not (driver_alone and plan_only):
        cluster.connect(ClusterConfig())
    with Watch() as watch:
        config = PrepareConfig(source="derm1m", input=str(folder), output=str(folder / "out"))
        work = read(config)
        planned = watch.seconds()
        handed_out = "" if plan_only else f"; handed out, {hand_out(work)} labelled rows resolved: all after "
        done = "" if plan_only else watch.seconds()
    print(
        f"{work.plan.num_rows:,} rows in {len(work.plan.shards):,} shards: read in "
        f"{work.timing.stages['read the table']:.1f} s, and planned, after {planned}{handed_out}{done}; "
        f"peak memory of its own {watch.own_gb:.3f} GB, {watch.bare_gb:.3f} GB of it the imports, and with pages of "
        f"files and of Ray's store {peak_gb():.3f} GB"
        + "".join(f"; planning allocates {peak / work.plan.num_rows:.1f} bytes a row at most" for peak in traced)
    )
    return 0


def trace_plan() -> list[int]:
    """Where the bytes will be noted that planning has allocated at most."""
    from dermray.prepare import work

    planned, peaks = work._planned, list[int]()

    def traced(*args: Any, **options: Any) -> Any:
        tracemalloc.start()
        try:
            return planned(*args, **options)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    work._planned = traced
    return peaks


def hand_out(work: Any) -> str:
    """Send the rows of every shard to a worker, which resolves their labels; how many it could."""
    from dermray import cluster, pieces

    specs = {spec.name: spec for spec in work.plan.shards}
    pool = pieces.Pool(noun="shard", operator="resolve", needs={"CPU": cluster.cpus_of_cores(1)})
    counts = [found for _, found in pieces.run(specs, partial(resolved, ontology=work.ontology), pool)]
    num_labelled, num_resolved = map(sum, zip(*counts, strict=True))
    return f"{num_resolved:,} of {num_labelled:,}"


def resolved(spec: Any, *, ontology: Any) -> tuple[int, int]:
    """How many rows of a shard have labels, and of how many these name nodes."""
    from dermray.prepare.samples import resolve_labels

    rows = spec.rows.select(["labels", "hierarchy"]).to_pylist()
    labelled = [row for row in rows if row["labels"]]
    return len(labelled), sum(bool(resolve_labels(row, ontology).labels) for row in labelled)


class Watch:
    """Looks at this process, whose memory grows and shrinks, and at the processes below it."""

    def __init__(self) -> None:
        self.bare_gb = self.own_gb = own_gb()
        self._began, self._before = time.perf_counter(), core_seconds()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def seconds(self) -> str:
        """Since the beginning, by the clock and by cores."""
        driver, others = (now - before for now, before in zip(core_seconds(), self._before, strict=True))
        clock = time.perf_counter() - self._began
        return f"{clock:.1f} s ({driver:.1f} core-seconds of the driver, {others:.1f} of others)"

    def _look(self) -> None:
        while not self._is_over.wait(0.05):
            self.own_gb = max(self.own_gb, own_gb())


def own_gb() -> float:
    """Memory of this process that is in no file and shared with nobody."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9


def core_seconds() -> tuple[float, float]:
    """Of this process, and of all below it, those that have ended among them."""
    others = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            others += sum(process.cpu_times()[:4])
    own = os.times()
    return own.user + own.system, others


def peak_gb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
