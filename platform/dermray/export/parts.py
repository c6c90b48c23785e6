"""What a format is made of: parts that are written one by one, and the samples they are written from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import SAMPLE, WHOLE
from dermray.corpus.side_tables import RowGroupReader, fields_of, index_of
from dermray.export.manifest import ExportedFile, PartRecord
from dermray.export.settings import ExportConfig

# Figures of a part.
SAMPLES, CAPTIONS, UNCAPTIONED = "samples", "captions", "samples_without_caption"
# Begins the names of counts of samples of which a field is lost, since the format has no place for it.
NOT_CARRIED = "not carried: "


@dataclass(frozen=True)
class Part:
    """One task's share of an export: samples `first` to `last` of a split, or of all splits where it is None.

    `paths` are the files (or the folder) that it writes, relative to the output.
    """

    kind: str
    split: str | None
    index: int
    first: int
    last: int
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its record is called."""
        return "-".join(filter(None, (self.kind, self.split, f"{self.index:05d}")))


@dataclass(frozen=True)
class Samples:
    """The samples of the splits to export, in manifest order, and the columns that their corpus has.

    Small enough to travel with every task.
    """

    indexes: Mapping[str, RowGroupReader]
    columns: pa.Schema = SAMPLE

    @classmethod
    def of(cls, corpus: str, manifest: Manifest, splits: Sequence[str], *, with_sides: bool = False) -> Samples:
        """The samples of some splits of a corpus.

        Args:
            with_sides: the columns of its side tables as well.

        Raises:
            CorpusError: the corpus has no such split.
        """
        columns = WHOLE if manifest.modalities else SAMPLE
        for field in (each for table in manifest.side_tables if with_sides for each in fields_of(table)):
            columns = columns.append(field)
        return cls({split: index_of(corpus, manifest.select(split), columns.names) for split in splits}, columns)

    @property
    def splits(self) -> dict[str, int]:
        """Samples of each split."""
        return {split: int(index.starts[-1]) for split, index in self.indexes.items()}

    def tables(self, split: str, first: int, last: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Samples `first` to `last` of a split, one row group after the other.

        Raises:
            CorpusError: a shard is gone or damaged.
        """
        index = self.indexes[split]
        for group in range(len(index.starts) - 1):
            start, end = int(index.starts[group]), int(index.starts[group + 1])
            if start < last and end > first:
                table = index.read_row_group(group, columns)
                low, high = max(first, start), min(last, end)
                yield table.slice(low - start, high - low)

    def rows(self, split: str, first: int, last: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As `tables`, sample by sample."""
        for table in self.tables(split, first, last, columns):
            yield from table.to_pylist()


Planner = Callable[[str, int, ExportConfig], list[Part]]
Writer = Callable[[Part, Samples, ExportConfig], PartRecord]


def ranges(num_samples: int, samples_per_file: int) -> list[tuple[int, int]]:
    """`(first, last)` of each file of a split."""
    return [(first, min(first + samples_per_file, num_samples)) for first in range(0, num_samples, samples_per_file)]


def key(file: int, place: int, samples_per_file: int) -> str:
    """The name of a sample as img2dataset gives it: the file's number in five digits, then the place in the file.

    With 10,000 samples a file the first is 000000000, and the first of the second file is 000010000.
    """
    digits = len(str(samples_per_file - 1)) if samples_per_file > 1 else 0
    return f"{file:05d}{place:0{digits}d}" if digits else f"{file:05d}"


def titles(captions: Sequence[Mapping[str, str]], aspects: Sequence[str]) -> list[str]:
    """The captions that other programs see, each on one line, the most wanted aspect first."""
    chosen = (caption["text"] for aspect in aspects for caption in captions if caption["aspect"] == aspect)
    return list(dict.fromkeys(" ".join(text.split()) for text in chosen))


def published(path: str, aside: Path) -> ExportedFile:
    """The record of a file that is about to be published."""
    with aside.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    return ExportedFile(path=path, num_bytes=aside.stat().st_size, sha256=digest.hexdigest())


def publish_text(output: str, path: str, fill: Callable[[TextIO], dict[str, int]]) -> PartRecord:
    """Write a file of text, line ends as `fill` gives them; the record of the part that it is.

    Args:
        output: of the export.
        path: relative to it.
        fill: writes the text and returns the part's figures.
    """
    with storage.staged(storage.join(output, path)) as aside:
        with aside.open("w", encoding="utf-8", newline="") as sink:
            counts = fill(sink)
        return PartRecord(files=(published(path, aside),), counts=counts)


def publish_bytes(output: str, path: str, data: bytes) -> ExportedFile:
    """Write a small file."""
    storage.write_bytes(storage.join(output, path), data)
    return ExportedFile(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
