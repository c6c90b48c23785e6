"""Side tables of a corpus that is being prepared: their rows dealt to its shards, and one file beside each shard.

A row is in a side table, or told: its key is blank or stood above, no sample or several have it, its row is malformed,
or its mask cannot be used. Shards are finished by then, so a side file's rows and row groups are those of its shard.
"""

from __future__ import annotations

import hashlib
import io
import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import masks, storage
from dermray.corpus.accounts import require_balance
from dermray.corpus.manifest import Shard, SideKind, SideShard, SideTable
from dermray.corpus.shards import read_row_group, stored_columns
from dermray.corpus.side_tables import FOLDER, ID, schema_of
from dermray.corpus.spelling import is_placeholder
from dermray.errors import CorpusError, ImageError
from dermray.prepare.plan import leaves_root
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig, SideTableConfig
from dermray.raw import tables
from dermray.raw.fetch import ImageStore, ahead
from dermray.raw.sources.rows import RawTable
from dermray.raw.tables import DroppedRow, StringTable

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
NO_KEY, DOUBLED, NO_SAMPLE, SEVERAL = "no_key", "key_stood_above", "no_sample", "several_samples"
DETAILS = {
    NO_KEY: "the row names no sample",
    DOUBLED: "a row above has the same key, and counts",
    NO_SAMPLE: "no sample of the corpus has this key",
    SEVERAL: "several samples of the corpus have this key",
}
NUM_READERS = 8


class SidePlace(NamedTuple):
    """A row of a side file that is there: the file, its row group, and the row in that."""

    path: str
    group: int
    row: int


@dataclass(frozen=True)
class SideRows:
    """The rows of a side table for one shard.

    Attributes:
        rows: cells by column, each row at the place of its sample.
        kinds: of all columns.
        kept: rows that stay as they are, likewise (`held_sides`).
    """

    table: str
    shard: Shard
    rows: Mapping[int, Mapping[str, Any]]
    kinds: Mapping[str, SideKind]
    kept: Mapping[int, SidePlace] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called while it is made."""
        return f"{self.table} of {storage.name_of(self.shard.path)}"


@dataclass(frozen=True)
class SideMade:
    """A side file, the rows that it could not take, and how many it has kept that say something."""

    file: SideShard
    dropped: tuple[DroppedRow, ...]
    num_kept: int = 0


@dataclass(frozen=True)
class Sides:
    """The side tables of a corpus; by name what became of their rows, and the rows that are told."""

    tables: tuple[SideTable, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, tuple[DroppedRow, ...]] = field(default_factory=dict)

    def listed(self) -> list[tuple[str, DroppedRow]]:
        """The rows that are told, each with its table's name."""
        return [(name, row) for name, rows in self.dropped.items() for row in rows]


@dataclass(frozen=True)
class Joined:
    """A side table's rows by shard, and those that no sample gets. `num_rows` counts all but those that stay, malformed
    ones too.
    """

    uri: str
    num_rows: int
    shards: tuple[SideRows, ...]
    dropped: tuple[DroppedRow, ...]
    kinds: Mapping[str, SideKind]


def read_side_tables(config: PrepareConfig, noted: dict[str, RawTable]) -> dict[str, StringTable]:
    """All side tables that are asked for, by name; `noted` gets their files' digests.

    Raises:
        CorpusError, StorageError: as `read_side_table`.
    """
    return {name: read_side_table(config, name, noted) for name in config.side_tables}


def read_side_table(config: PrepareConfig, name: str, noted: dict[str, RawTable]) -> StringTable:
    """Read a side table, and look whether it has its columns and numbers.

    Raises:
        CorpusError: there is no such table, a column of it is missing, or a number is none.
        StorageError: it cannot be read.
    """
    asked = config.side_tables[name]
    below, is_relative = storage.join(config.input, asked.uri), "://" not in asked.uri and asked.uri[:1] != "/"
    uri = below if is_relative and storage.exists(below) else storage.normalise(asked.uri)
    try:
        data = storage.read_bytes(uri, max_bytes=tables.MAX_TABLE_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CorpusError(
            f"side_tables.{name}.uri: {asked.uri} is no file, neither as it stands nor under input"
        ) from None
    noted[uri] = RawTable(uri, len(data), hashlib.sha256(data).hexdigest())
    cells = tables.parse(uri, data)
    cells.require(asked.key, *asked.kinds, hint=f"; say which it is with side_tables.{name}")
    for column in asked.numbers:
        for row, cell in zip(cells.rows.to_pylist(), cells[column].to_pylist(), strict=True):
            _number(cells.uri, row, column, cell)
    return cells


def join(
    config: PrepareConfig,
    name: str,
    cells: StringTable,
    final: Sequence[ShardRecord],
    is_ours: Callable[[pa.ChunkedArray], np.ndarray] | None = None,
) -> Joined:
    """Deal the rows of a side table to the samples of a corpus's shards by their keys.

    Args:
        is_ours: of samples' `known`, whether the table is about each, bool `[N]`; None: it is about all of the corpus.

    Raises:
        CorpusError: not one row has the key of a sample.
    """
    asked = config.side_tables[name]
    shards = [(record.shard, record) for record in final if record.shard is not None]
    places = _places(config, asked, shards, is_ours)
    rows: list[dict[int, dict[str, Any]]] = [{} for _ in shards]
    dropped, seen = list(cells.dropped), set[str]()
    columns = [cells[column].to_pylist() for column in asked.kinds]
    keys = (cell.strip() for cell in cells[asked.key].to_pylist())
    if asked.by == "image":
        # As the paths of samples are kept.
        keys = (key and posixpath.normpath(key) for key in keys)
    for row, key, *values in zip(cells.rows.to_pylist(), keys, *columns, strict=True):
        found = places.get(key, [])
        reason = NO_KEY if is_placeholder(key) else DOUBLED if key in seen else ""
        reason = reason or ("" if len(found) == 1 else SEVERAL if found else NO_SAMPLE)
        seen.add(key)
        if reason:
            dropped.append(DroppedRow(row, key, "", reason, DETAILS[reason]))
        else:
            ((shard, place),) = found
            said = dict(zip(asked.kinds, values, strict=True))
            rows[shard][place] = {"row": row, "key": key, "cells": said}
    num_rows = len(cells.rows) + len(cells.dropped)
    used = sum(map(len, rows))
    require_balance(f"side table {name}", num_rows, used, Counter(each.reason for each in dropped))
    if not used:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(row.reason for row in dropped).items())
        raise CorpusError(
            f"{cells.uri}: none of its {num_rows:,} rows has the {asked.by} of a sample in column {asked.key!r} (such "
            f"as {next(iter(places), '')!r}); name another column with side_tables.{name}.key or what it holds with "
            f"side_tables.{name}.by ({reasons})"
        )
    dealt = tuple(SideRows(name, shard, found, asked.kinds) for (shard, _), found in zip(shards, rows, strict=True))
    return Joined(cells.uri, num_rows, dealt, tuple(dropped), asked.kinds)


def _places(
    config: PrepareConfig,
    asked: SideTableConfig,
    shards: Sequence[tuple[Shard, ShardRecord]],
    is_ours: Callable[[pa.ChunkedArray], np.ndarray] | None,
) -> dict[str, list[tuple[int, int]]]:
    """The samples of each key, as number of the shard and place in it, of those that the table is about."""

    def keys(number: int) -> list[str]:
        shard, record = shards[number]
        if asked.by != "source_id":
            return record.notes[asked.by].to_pylist()
        uri = storage.inside(config.output, shard.path)
        groups = (read_row_group(uri, group, [asked.by]) for group in range(len(shard.row_groups)))
        return [key for table in groups for key in table[asked.by].to_pylist()]

    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, found in enumerate(ahead(list(range(len(shards))), keys, num_threads=NUM_READERS)):
        # Other sources may call theirs the same.
        meant = np.ones(len(found), bool) if is_ours is None else is_ours(shards[number][1].notes["known"])
        for place in np.flatnonzero(meant).tolist():
            places[found[place].strip()].append((number, place))
    return places


class SideMaker:
    """Makes the files of one corpus's side tables; knows nothing of Ray, and travels to where the work is done."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config

    @cached_property
    def _store(self) -> ImageStore:
        config = self.config
        return ImageStore(config.input, max_bytes=config.max_image_bytes, follow_links=config.follow_links)

    def make(self, work: SideRows) -> SideMade:
        """Write the file beside a shard.

        Raises:
            CorpusError: the shard is gone or damaged.
            StorageError: the input or the output fails for good.
        """
        kinds = work.kinds
        uri = storage.inside(self.config.output, work.shard.path)
        schema, dropped = schema_of(kinds), list[DroppedRow]()
        sink, place, num_kept = io.BytesIO(), 0, 0
        with pq.ParquetWriter(sink, schema, write_page_checksum=True, **_encoding(schema, kinds)) as writer:
            # One row group after the other: masks are the size of pictures.
            for group, size in enumerate(work.shard.row_groups):
                samples = read_row_group(uri, group, [ID, "width", "height"]).to_pylist()
                rows = [self._row(each, work.rows.get(place + at), kinds, dropped) for at, each in enumerate(samples)]
                kept = {at: work.kept[place + at] for at in range(size) if place + at in work.kept}
                num_kept += self._keep(kept, list(kinds), rows)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=size)
                place += size
        content = sink.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        at = "-".join(storage.name_of(work.shard.path).split("-")[:2])
        path = f"{FOLDER}/{work.table}/{at}-{digest[:16]}.parquet"
        storage.write_bytes(storage.join(self.config.output, path), content)
        return SideMade(SideShard(path=path, num_bytes=len(content), sha256=digest), tuple(dropped), num_kept)

    def _keep(self, kept: Mapping[int, SidePlace], columns: Sequence[str], rows: list[dict[str, Any]]) -> int:
        """Fill in the rows that stay, by their place in a row group; how many of them say something."""
        tables: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for path, group, _ in kept.values():
            if (path, group) not in tables:
                # Of the columns those that the file has.
                file = storage.inside(self.config.output, path)
                tables[path, group] = read_row_group(file, group, columns).to_pylist()
        found = {at: tables[path, group][row] for at, (path, group, row) in kept.items()}
        for at, row in found.items():
            rows[at].update(row)
        return sum(any(value is not None for value in row.values()) for row in found.values())

    def _row(
        self,
        sample: Mapping[str, Any],
        said: Mapping[str, Any] | None,
        kinds: Mapping[str, str],
        dropped: list[DroppedRow],
    ) -> dict[str, Any]:
        """A sample's row; one whose mask is no good is told and says nothing."""
        if said is None:
            return {ID: sample[ID]}
        row = {ID: sample[ID]}
        for column, cell in said["cells"].items():
            try:
                row[column] = self._value(kinds[column], column, cell, sample)
            except ImageError as error:
                dropped.append(DroppedRow(said["row"], said["key"], cell, error.reason, f"column {column}: {error}"))
                return {ID: sample[ID]}
        return row

    def _value(self, kind: str, column: str, cell: str, sample: Mapping[str, Any]) -> Any:
        if kind == "number":
            return _number("", 0, column, cell)
        if is_placeholder(cell):
            return None
        if kind == "text":
            return " ".join(cell.split())
        if leaves_root(cell):
            raise ImageError("path_outside_root", "the path is absolute or leaves the input folder")
        fetched = self._store.fetch(posixpath.normpath(cell))
        if fetched.data is None:
            raise ImageError(fetched.reason, fetched.detail)
        mask = masks.decode_mask(fetched.data, max_pixels=self.config.max_pixels)
        return masks.encode_mask(masks.fitted(mask, sample["width"], sample["height"]))


def _number(uri: str, row: int, column: str, cell: str) -> float | None:
    # Python's own reading takes 12_5 and digits of other scripts as well, which nobody means as numbers.
    value = float(cell) if _NUMBER.fullmatch(cell.strip()) else math.nan
    if math.isfinite(value):
        # -1 as well, which in a column of classes stands for none.
        return value
    if not is_placeholder(cell):
        raise CorpusError(f"{uri}, row {row}, column {column!r}: {cell[:40]!r} is no number; mend it or leave it blank")
    return None


def _encoding(schema: pa.Schema, kinds: Mapping[str, str]) -> dict[str, Any]:
    leaves = stored_columns(schema)
    # PNGs do not get smaller.
    plain = [name for name, kind in kinds.items() if kind == "mask"]
    return {
        "compression": {leaf: "NONE" if leaf in plain else "ZSTD" for leaf in leaves},
        "use_dictionary": [leaf for leaf in leaves if kinds.get(leaf) == "text"],
        "write_statistics": False,
    }


def gathered(config: PrepareConfig, joined: Mapping[str, Joined], made: Mapping[str, SideMade]) -> Sides:
    """The side tables, of the files that were made, by `SideRows.name`.

    Raises:
        CorpusError: of a table no row could be used.
    """
    found, figures, told = [], {}, {}
    for name, each in joined.items():
        files = [made[rows.name] for rows in each.shards]
        figures[name], told[name] = accounts(each, files)
        num_kept = sum(side.num_kept for side in files)
        if name in config.side_tables or num_kept:
            found.append(SideTable(name=name, columns=dict(each.kinds), shards=tuple(side.file for side in files)))
        if name in config.side_tables and figures[name]["used"] == num_kept:
            first = told[name][0]
            raise CorpusError(
                f"{each.uri}: none of its {each.num_rows:,} rows can be used; row {first.row}: "
                f"{first.detail or first.reason}; mend the table or its files and run the same command again"
            )
    return Sides(tuple(found), figures, told)


def accounts(joined: Joined, made: Sequence[SideMade]) -> tuple[dict[str, Any], tuple[DroppedRow, ...]]:
    """The figures of a side table for the report, and its rows that are told, in the table's order.

    Raises:
        AssertionError: rows are unaccounted for.
    """
    dropped = [*joined.dropped, *(row for each in made for row in each.dropped)]
    lost = sum(len(each.dropped) for each in made)
    kept = sum(each.num_kept for each in made)
    used = sum(len(each.rows) for each in joined.shards) - lost + kept
    told = Counter(row.reason for row in dropped)
    figures = require_balance(joined.uri, joined.num_rows + kept, used, dict(sorted(told.items())))
    return figures, tuple(sorted(dropped, key=lambda row: row.row))
