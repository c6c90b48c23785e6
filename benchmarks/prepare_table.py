"""A table of Derm1M's size, read, resolved and planned without an image: `python benchmarks/prepare_table.py`.

Writes a table of 1,029,761 rows in the layout of Derm1M's v2 release (captions of 41 words on average, a tree of four
levels, file names that tell their group) and a disease tree, then in a fresh process reads it, resolves every label
against the tree, makes the plan and lists every shard. Prints the seconds of each part and the peak memory. With
`--input FOLDER` the rows and the tree of a real release are repeated instead.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    peaks: list[float] = []
    for num_rows in options.num_rows:
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            write(Path(folder), num_rows, options.input)
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1] if done.stdout else "", flush=True)
        if done.returncode:
            return done.returncode
        peaks.append(float(done.stdout.rpartition("peak memory ")[2].split()[0]))
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


def measure(folder: Path) -> int:
    """What the driver does before Ray starts, and listing what it would send out."""
    from dermray.prepare.pipeline import read
    from dermray.prepare.samples import resolve_labels
    from dermray.prepare.settings import PrepareConfig

    bare = peak_gb()
    started = time.perf_counter()
    config = PrepareConfig(source="derm1m", input=str(folder), output=str(folder / "out"))
    work = read(config)
    planned = time.perf_counter()
    num_labelled = num_resolved = num_rows = 0
    for spec in work.plan.shards:
        for labels, hierarchy in zip(spec.rows["labels"].to_pylist(), spec.rows["hierarchy"].to_pylist(), strict=True):
            num_labelled += bool(labels)
            num_resolved += bool(
                labels and resolve_labels({"labels": labels, "hierarchy": hierarchy}, work.ontology).labels
            )
        num_rows += spec.rows.num_rows
    done = time.perf_counter()
    print(
        f"{num_rows:,} rows in {len(work.plan.shards):,} shards: read and planned in {planned - started:.1f} s, "
        f"resolved {num_resolved:,} of {num_labelled:,} labelled rows and listed in {done - planned:.1f} s, "
        f"{done - started:.1f} s in all; peak memory {peak_gb():.3f} GB ({bare:.3f} GB of it the imports)"
    )
    return 0


def peak_gb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
