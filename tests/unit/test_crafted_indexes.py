"""Files of an index that somebody else wrote, with a manifest that fits them: read, or refused in one line."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermray.errors import VectorIndexError
from dermray.vectors.index import VectorIndex, graphs
from dermray.vectors.index.vectors import build
from tests.serving import save_embeddings

ROOT = Path(__file__).parents[2]
ROWS, DIM = 300, 8
NUM_MUTATIONS = 400
MAX_EXTRA_BYTES = 200_000_000
ODD_NUMBERS = [0, 1, ROWS, ROWS - 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


class Target:
    """An index, one of whose files is replaced, with the digest in its manifest."""

    def __init__(self, folder: Path, *, graph: bool, which: str) -> None:
        self.folder, self.which = folder / "index", which
        self.vectors = save_embeddings(folder / "embeddings", rows=ROWS, dim=DIM)
        build(str(folder / "embeddings"), str(self.folder), exact_below=0 if graph else 10_000)
        self.manifest = json.loads((self.folder / "index.json").read_text())
        self.whole = (self.folder / self.manifest["images"][which]).read_bytes()

    def said(self, data: bytes) -> str:
        """What loading it and searching say of such a file; nothing if they succeed."""
        side = self.manifest["images"]
        (self.folder / side[self.which]).write_bytes(data)
        for name, which in (("sha256", "vectors"), ("rows_sha256", "rows")):
            side[name] = hashlib.sha256((self.folder / side[which]).read_bytes()).hexdigest()
        (self.folder / "index.json").write_text(json.dumps(self.manifest))
        try:
            found = VectorIndex.load(str(self.folder)).search(self.vectors[0], 5)
        except VectorIndexError as error:
            return str(error)
        assert len(found) <= 5
        return ""


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Cut off, or with a number or some bytes changed: in its header, at its end or anywhere."""
    changed = bytearray(data)
    place = int(random.choice([random.integers(200), len(data) - 1 - random.integers(200), random.integers(len(data))]))
    match int(random.integers(4)):
        case 0:
            del changed[place:]
        case 1:
            changed[place : place + 8] = struct.pack("<Q", ODD_NUMBERS[int(random.integers(len(ODD_NUMBERS)))])
        case 2:
            changed[place : place + 4] = struct.pack("<i", int(random.choice([-1, 0, ROWS, 2**31 - 1, -(2**31)])))
        case _:
            for _ in range(int(random.integers(1, 6))):
                changed[min(len(changed) - 1, place + int(random.integers(32)))] ^= int(random.integers(1, 256))
    return bytes(changed)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def attack(folder: str) -> None:
    """So many mutations of every kind of file; prints how many were read and refused, and the memory that it took."""
    random, counts = np.random.default_rng(11), collections.Counter[str]()
    targets = [
        Target(Path(folder) / "graph", graph=True, which="vectors"),
        Target(Path(folder) / "array", graph=False, which="vectors"),
        Target(Path(folder) / "rows", graph=True, which="rows"),
    ]
    for target in targets:
        assert target.said(target.whole) == ""
    before = peak_bytes()
    for target in targets:
        for _ in range(NUM_MUTATIONS):
            said = target.said(mutated(target.whole, random))
            assert said == "" or ("run jobs/index.py again" in said and "\n" not in said), said
            counts["refused" if said else "read"] += 1
    print(json.dumps([counts["read"], counts["refused"], peak_bytes() - before]))


def test_mutated_files_are_read_or_refused_and_take_no_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}"}
    run = f"from tests.unit.test_crafted_indexes import attack; attack({str(tmp_path)!r})"
    told = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-2000:]
    num_read, num_refused, extra = json.loads(told.stdout.splitlines()[-1])
    assert num_read + num_refused == 3 * NUM_MUTATIONS
    assert num_read > 50
    assert num_refused > 500
    assert extra < MAX_EXTRA_BYTES


def tail(whole: bytes) -> int:
    """Where the graph's settings are: behind its lists."""
    at = len(graphs.HNSW_FLAT) + graphs._HEADER.size
    for item_bytes in graphs._ITEM_BYTES:
        at = graphs._after_list(whole, at, item_bytes)
    return at


def with_number(whole: bytes, place: int, layout: str, number: int) -> bytes:
    changed = bytearray(whole)
    struct.pack_into(layout, changed, place, number)
    return bytes(changed)


def npy(array: object) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


def flat_index(_: bytes) -> bytes:
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(np.zeros((ROWS, DIM), np.float32))
    return faiss.serialize_index(index).tobytes()


GRAPHS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "cut off|no HNSW graph"),
    "another kind of index": (flat_index, "no HNSW graph"),
    "an array": (lambda whole: npy(np.zeros((ROWS, DIM), np.float32)), "no HNSW graph"),
    "its first half": (lambda whole: whole[: len(whole) // 2], "bytes are left|cut off"),
    "a huge list": (lambda whole: with_number(whole, 37, "<Q", 1 << 62), "bytes are left"),
    "a list past 64 bits": (lambda whole: with_number(whole, 37, "<Q", (1 << 64) - 1), "bytes are left"),
    "another dimension": (lambda whole: with_number(whole, 4, "<i", 1 << 30), "cannot be read"),
    "more vectors than there are": (lambda whole: with_number(whole, 8, "<q", 1 << 40), "cannot be read"),
    "vectors below zero": (lambda whole: with_number(whole, 8, "<q", -1), "cannot be read"),
    "an entry outside": (lambda whole: with_number(whole, tail(whole), "<i", ROWS), "cannot be read"),
    "a level of its own": (lambda whole: with_number(whole, tail(whole) + 4, "<i", 1 << 20), "cannot be read"),
    "a search without end": (lambda whole: with_number(whole, tail(whole) + 12, "<i", 300_000_000), "candidates"),
    "a neighbour outside": (lambda whole: with_number(whole, tail(whole) - 4, "<i", ROWS), "cannot be read"),
    "a neighbour below zero": (lambda whole: with_number(whole, tail(whole) - 4, "<i", -7), "cannot be read"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_crafted_graph_is_refused(name: str, tmp_path: Path) -> None:
    target, (craft, said) = Target(tmp_path, graph=True, which="vectors"), GRAPHS[name]
    with pytest.raises(VectorIndexError, match=said):
        raise VectorIndexError(target.said(craft(target.whole)))


ARRAYS = {
    "a pickle": npy(np.array([{"a": 1}], dtype=object)),
    "a bare pickle": pickle.dumps({"a": 1}),
    "other numbers": npy(np.zeros((ROWS, DIM))),
    "an archive": b"PK\x03\x04" + bytes(100),
    "a huge shape": npy(np.zeros((ROWS, DIM), np.float32)).replace(b"(300, 8)", b"(1<<50,)"),
    "a bracket that stays open": npy(np.zeros((ROWS, DIM), np.float32)).replace(b", 8)", b", 8 "),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_crafted_array_is_refused(name: str, tmp_path: Path) -> None:
    assert "run jobs/index.py again" in Target(tmp_path, graph=False, which="vectors").said(ARRAYS[name])


@pytest.mark.parametrize(
    "columns",
    [
        {"other": pa.array(["a"] * ROWS)},
        {"sample_id": pa.array(["a"] * ROWS), "labels": pa.array([1] * ROWS)},
        {"sample_id": pa.array([b"\xf1"] * ROWS).view(pa.string())},
    ],
    ids=["missing", "type", "letters"],
)  # fmt: skip
def test_crafted_rows_are_refused(columns: dict[str, pa.Array], tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=32)
    assert "run jobs/index.py again" in Target(tmp_path, graph=True, which="rows").said(sink.getvalue())
