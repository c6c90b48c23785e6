"""Splits that lie beside a table: `splits/train.*` and `splits/val.*`, each a list of row numbers or file names.

A file is text (one a line), CSV with a header (its only column, or the one called index, row, filename or image) or a
JSON list. Whether rows are numbered from 0 or 1 is told by the numbers of all files together: 0 or the number of rows
is among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from dermray import storage
from dermray.documents import parse_json
from dermray.errors import CorpusError, StorageError
from dermray.raw.sources.rows import Findings, SourceRequest
from dermray.raw.spelling import folded
from dermray.raw.splits import first_known
from dermray.raw.tables import DroppedRow, StringTable, parse

FOLDER = "splits"
ENDINGS = (".txt", ".csv", ".json")
COLUMNS = ("filename", "image", "index", "indices", "row", "id")
UNCLEAR = "split_unclear"
MAX_BYTES = 1 << 30


def read_splits(request: SourceRequest, cells: StringTable, image: str) -> tuple[pa.Array, list[DroppedRow]]:
    """The split of each row of a table, null where none or several name it; and these rows as dropped.

    Args:
        request: whose input has the folder.
        cells: the table, all its rows.
        image: its column of file names.

    Raises:
        CorpusError: the folder holds no such file, two for one split, or numbers that do not tell which rows are meant.
    """
    uri = storage.join(request.input, FOLDER)
    listed = {split: _entries(file, request.findings) for split, file in _files(uri, request.findings).items()}
    numbered = all(entry.isdecimal() for entries in listed.values() for entry in entries)
    places = (
        _by_number(uri, listed, cells.num_rows) if numbered else _by_name(request, listed, cells[image].to_pylist())
    )
    names = cells[image].to_pylist()
    splits: list[str | None] = []
    dropped: list[DroppedRow] = []
    for place, (row, name) in enumerate(zip(cells.rows.to_pylist(), names, strict=True)):
        said = sorted(places.get(row if numbered else place, ()))
        splits.append(said[0] if len(said) == 1 else None)
        if len(said) != 1:
            detail = f"{' and '.join(said)} of {uri} list it" if said else f"no file of {uri} lists it"
            dropped.append(DroppedRow(row, name, name, UNCLEAR, detail))
    return pa.array(splits, pa.string()), dropped


def _files(uri: str, findings: Findings) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in storage.list_files(uri):
        stem, _, ending = storage.name_of(file).lower().rpartition(".")
        split = first_known(stem.replace("-", "_").split("_"))
        if split is None or f".{ending}" not in ENDINGS:
            findings.not_read[f"files in {FOLDER}/ that list no split"] += 1
            continue
        if split in found:
            raise CorpusError(f"{found[split]} and {file} both list the split {split}: leave one of them")
        found[split] = file
    if not found:
        raise CorpusError(f"{uri} lists no split: train and val are expected there, as .txt, .csv or .json")
    return found


def _entries(uri: str, findings: Findings) -> list[str]:
    """What a file lists, as texts."""
    data = storage.read_bytes(uri, max_bytes=MAX_BYTES)
    if uri.lower().endswith(".csv"):
        table = parse(uri, data)
        if table.dropped:
            findings.unused[f"malformed rows of {FOLDER}/{storage.name_of(uri)}"] += len(table.dropped)
        names = table.table.column_names
        column = names[0] if len(names) == 1 else next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise CorpusError(
                f"{uri} has none of the columns {', '.join(COLUMNS)}; its columns are: {', '.join(names)}"
            )
        return [cell.strip() for cell in table[column].to_pylist() if cell.strip()]
    try:
        if uri.lower().endswith(".json"):
            values = parse_json(data, "it")
            if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
                raise CorpusError(f"{uri} must hold a list of row numbers or file names")
            return [str(value).strip() for value in values]
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except (ValueError, RecursionError, StorageError) as error:
        raise CorpusError(f"{uri} cannot be read: {error}") from None


def _by_number(uri: str, listed: Mapping[str, Iterable[str]], num_rows: int) -> dict[int, set[str]]:
    """Row number, counted from 1 → the splits that list it."""
    numbers = {split: np.array([int(entry[:18]) for entry in entries], np.int64) for split, entries in listed.items()}
    every = np.concatenate([*numbers.values(), np.zeros(0, np.int64)])
    from_0, from_1 = bool((every == 0).any()), bool((every == num_rows).any())
    if from_0 == from_1 or (len(every) and int(every.max()) > num_rows):
        raise CorpusError(
            f"{uri}: its numbers do not tell whether the {num_rows:,} rows are counted from 0 or from 1: either 0 or "
            f"{num_rows} should be among them, and none above; list file names instead"
        )
    places: dict[int, set[str]] = defaultdict(set)
    for split, rows in numbers.items():
        for row in (rows + from_0).tolist():
            places[row].add(split)
    return places


def _by_name(request: SourceRequest, listed: Mapping[str, Iterable[str]], names: list[str]) -> dict[int, set[str]]:
    """Place in the table, from 0 → the splits that list its file, with or without the folder `images/`."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[folded(name).removeprefix("images/")].append(place)
    found: dict[int, set[str]] = defaultdict(set)
    for split, entries in listed.items():
        for entry in entries:
            here = places.get(folded(entry).removeprefix("images/"))
            if here is None:
                request.findings.unused[f"names in {FOLDER}/ that no row has"] += 1
            for place in here or ():
                found[place].add(split)
    return found
