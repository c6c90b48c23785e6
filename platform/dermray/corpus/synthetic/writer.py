"""Writes the synthetic corpus to a local folder in the raw layout of Derm1M.

    OUTPUT/Derm1M_v2_pretrain.csv   written last: a folder without it is not a corpus
    OUTPUT/ontology.json
    OUTPUT/synthetic.json           written first: the folder is this module's, made with these numbers
    OUTPUT/youtube/….jpg, …         `filename` in the table is relative to OUTPUT

Image `i` depends on (seed, i) alone, so the bytes are the same for every number of workers.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import cv2
import numpy as np
import numpy.typing as npt

from dermray import storage
from dermray.corpus.synthetic.conditions import CONDITIONS, ontology
from dermray.corpus.synthetic.drawing import draw
from dermray.corpus.synthetic.wording import COLUMNS, NO_CONCEPTS, SOURCES, Source, describe
from dermray.errors import ConfigError, CorpusError, StorageError
from dermray.progress import Progress, Say, print_line

# Raise whenever the same (num_images, seed) would give other bytes.
GENERATOR_VERSION = 1
TABLE_NAME = "Derm1M_v2_pretrain.csv"
RECORD_NAME = "synthetic.json"
SIZES = ((120, 160), (160, 120), (128, 160), (160, 128), (144, 144), (112, 168))
PNG_FOLDERS = frozenset({"pubmed", "twitter"})
PNG_SHARE = 0.4
CHUNK_IMAGES = 32
# Below this, starting processes costs more than it saves.
MIN_IMAGES_PER_WORKER = 150


class Summary(TypedDict):
    """What a folder holds. `table` is the path of the CSV; counts are of what occurs in it."""

    num_images: int
    num_conditions: int
    num_concepts: int
    seed: int
    generator_version: int
    table: str


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive images for one worker: `conditions[k]` is the condition of image `start + k`."""

    folder: str
    seed: int
    start: int
    conditions: tuple[int, ...]


def write_corpus(
    output: str | Path,
    *,
    num_images: int,
    seed: int,
    workers: int | None = None,
    say: Say = print_line,
) -> Summary:
    """Draws `num_images` photographs with their rows and returns the summary.

    A folder that already holds the corpus of the same `num_images`, `seed` and generator version is left as it is.
    `workers` processes are spawned (default: one per core, fewer for few images); `say` takes lines of progress.

    Raises:
        ConfigError: `num_images` or `workers` is below 1, or `seed` below 0.
        CorpusError: a drawing process was killed.
        StorageError: the folder cannot be written, or holds something else.
    """
    if num_images < 1 or seed < 0 or (workers is not None and workers < 1):
        raise ConfigError(
            f"num_images={num_images}, seed={seed}, workers={workers}: give at least 1 image and 1 worker, seed >= 0"
        )
    folder = Path(output).absolute()
    with _storage_errors(folder):
        finished = _finished(folder, num_images, seed)
        if finished is not None:
            return finished
        _claim(folder, {"num_images": num_images, "seed": seed, "generator_version": GENERATOR_VERSION})
        rows = _draw_all(folder, num_images, seed, workers, say)
        summary = _summarise(rows, folder / TABLE_NAME, seed)
        _write_aside(folder / "ontology.json", json.dumps(ontology(), indent=2) + "\n")
        _write_aside(folder / RECORD_NAME, json.dumps({**summary, "table": TABLE_NAME}, indent=2) + "\n")
        _write_table(folder / TABLE_NAME, rows)
    return summary


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the synthetic corpus ({error}); check space and rights") from error


def _finished(folder: Path, num_images: int, seed: int) -> Summary | None:
    """The summary of a complete corpus that was made from the same three numbers, else None."""
    record, table = folder / RECORD_NAME, folder / TABLE_NAME
    if not (record.is_file() and table.is_file()):
        return None
    summary = storage.read_object(record)
    asked = {"num_images": num_images, "seed": seed, "generator_version": GENERATOR_VERSION}
    if any(summary.get(name) != value for name, value in asked.items()):
        return None
    return cast(Summary, {**summary, "table": str(table)})


def _claim(folder: Path, request: dict[str, int]) -> None:
    """Removes an earlier synthetic corpus, table first, and makes the folder ready; refuses to touch any other."""
    table, record = folder / TABLE_NAME, folder / RECORD_NAME
    images = [folder / source.folder for source in SOURCES]
    if not record.exists():
        foreign = [path for path in (table, *images) if path.exists()]
        if foreign:
            raise StorageError(f"{foreign[0]}: not made by the synthetic corpus; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    table.unlink(missing_ok=True)
    _write_aside(record, json.dumps(request, indent=2) + "\n")
    for path in images:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()


def _draw_all(folder: Path, num_images: int, seed: int, workers: int | None, say: Say) -> list[dict[str, str]]:
    chunks = _chunks(folder, num_images, seed)
    workers = min(workers or os.cpu_count() or 1, max(1, num_images // MIN_IMAGES_PER_WORKER))
    if workers == 1:
        return _collect(map(_draw_chunk, chunks), num_images, say)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            return _collect(pool.map(_draw_chunk, chunks), num_images, say)
    except BrokenProcessPool as error:
        raise CorpusError(
            f"{folder}: a drawing process ended before its work; check free memory and that the calling script "
            "has a __main__ guard, or draw with workers=1"
        ) from error


def _chunks(folder: Path, num_images: int, seed: int) -> list[_Chunk]:
    """The work, with conditions dealt evenly: counts differ by one at most."""
    order = np.arange(num_images) % len(CONDITIONS)
    np.random.default_rng([seed, num_images]).shuffle(order)
    return [
        _Chunk(str(folder), seed, start, tuple(order[start : start + CHUNK_IMAGES].tolist()))
        for start in range(0, num_images, CHUNK_IMAGES)
    ]


def _collect(parts: Iterable[list[dict[str, str]]], num_images: int, say: Say) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    with Progress("synthetic corpus", num_images, "images", say=say) as progress:
        for part in parts:
            rows.extend(part)
            progress.advance(len(part))
    return rows


def _draw_chunk(chunk: _Chunk) -> list[dict[str, str]]:
    return [
        _draw_row(Path(chunk.folder), chunk.seed, chunk.start + offset, condition)
        for offset, condition in enumerate(chunk.conditions)
    ]


def _draw_row(folder: Path, seed: int, index: int, condition: int) -> dict[str, str]:
    """Draws image `index`, writes its file, and returns its row."""
    rng = np.random.default_rng([seed, index])
    size = SIZES[int(rng.integers(len(SIZES)))]
    photograph, attributes = draw(CONDITIONS[condition], rng, size=size)
    source = SOURCES[int(rng.choice(len(SOURCES), p=[source.share for source in SOURCES]))]
    filename = _filename(source, index, rng)
    (folder / filename).write_bytes(_encode(photograph, filename, int(rng.integers(86, 95))))
    return {"filename": filename, **describe(attributes, rng, source)}


def _filename(source: Source, index: int, rng: np.random.Generator) -> str:
    """A name in the source's manner, spaces and Chinese characters included.

    `index` makes the video, article, page or post unique: every drawing is another patient.
    """
    suffix = "png" if source.folder in PNG_FOLDERS and rng.random() < PNG_SHARE else "jpg"
    volume, page = divmod(index, 100_000)
    match source.folder:
        case "youtube":
            stem = f"{rng.integers(16**5):05x}{index:06x}_frame_{rng.integers(60_000)}_0"
        case "pubmed":
            stem = f"{index % 256:02x}_PMC{1_000_000 + index}_g{rng.integers(1, 9):03d}_0"
        case "edu":
            stem = f"Atlas of Drawn Skin, 2nd edition (part {volume + 1})_{page:05d}_{page:05d}"
        case "note":
            stem = f"皮肤病彩色图谱{volume + 1}_{page:05d}_{page:05d}"
        case "public":
            stem = f"drawn-skin-{index}"
        case _:
            stem = f"{10_000 + index}_1"
    return f"{source.folder}/{stem}.{suffix}"


def _encode(photograph: npt.NDArray[np.uint8], filename: str, quality: int) -> bytes:
    suffix = os.path.splitext(filename)[1]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 3]
    _, encoded = cv2.imencode(suffix, cv2.cvtColor(photograph, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()


def _summarise(rows: list[dict[str, str]], table: Path, seed: int) -> Summary:
    paths = {", ".join(condition.path) for condition in CONDITIONS}
    concepts = {concept for row in rows for concept in row["skin_concept"].split(", ")} - {NO_CONCEPTS}
    return Summary(
        num_images=len(rows),
        num_conditions=len(paths & {row["hierarchical_disease_label"] for row in rows}),
        num_concepts=len(concepts),
        seed=seed,
        generator_version=GENERATOR_VERSION,
        table=str(table),
    )


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)
