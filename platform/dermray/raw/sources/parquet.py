"""Parquet files that hold their images, as Hugging Face publishes image data sets; nothing is unpacked.

Every `*.parquet` below the input that has the column `columns.image` (bytes, or a struct of bytes and path) is read, in
the order of their paths. The other columns are those of `csv`: caption (a list gives the image all of its captions),
label (a class label gives its name), and whatever `columns.*` names; lists are joined with commas, columns that nothing
names are kept in `meta.extra`. Without a split column the file or a folder of it may name the split
(`train-00000-of-00004.parquet`, `validation/a.parquet`). An image that is not embedded is looked for at its path. Row
numbers count the rows of all files.

Files that jobs/export.py has written, and the shards of a prepared corpus, give the prepared samples back.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dermray import storage
from dermray.corpus.exchange import FIELDS
from dermray.corpus.schema import MODALITY, SCHEMA_VERSION, VERSION_KEY
from dermray.documents import parse_json
from dermray.errors import CorpusError, DocumentError
from dermray.raw import parquet_images, tables
from dermray.raw.litter import litter
from dermray.raw.sources import csv
from dermray.raw.sources.pictures import modalities
from dermray.raw.sources.rows import PREPARED, RAW, RawRows, SourceRequest, captions_from, prepared_rows
from dermray.raw.sources.tables import Blocks, StringTable, read_tree
from dermray.raw.spill import Growing, blocks
from dermray.raw.splits import split_of_file

SPLIT = "split"
# What a prepared corpus of an early version lacks, or one of which nobody says it.
NEWER = frozenset({"phash", MODALITY.name})


def read(request: SourceRequest) -> RawRows:
    """Read all files below `request.input` (or `request.table` alone).

    Raises:
        CorpusError: no file holds images, one is damaged, or it has neither captions nor labels.
        OntologyError: `ontology.json` lies there and is malformed.
        StorageError: a file cannot be read.
    """
    prepared, cells = Growing(), Growing()
    numbers: list[pa.Array] = []
    num_rows = 0
    for file in files_of(request):
        limit = None if request.limit is None else request.limit - num_rows
        if limit == 0:
            break
        table, is_prepared = read_file(request, file)
        if table is None:
            request.findings.not_read[f".parquet without a column {request.columns.image!r} of images"] += 1
            continue
        table = table.slice(0, limit)
        request.rows_met[file] = table.num_rows
        rows = pa.array(np.arange(num_rows + 1, num_rows + table.num_rows + 1))
        num_rows += table.num_rows
        if not table.num_rows:
            continue
        if is_prepared:
            known = modalities(request.findings, MODALITY.name, table[MODALITY.name].combine_chunks(), rows)
            table = table.set_column(table.column_names.index(MODALITY.name), MODALITY, known)
            prepared.append(prepared_rows(table.append_column("row", rows).select(PREPARED.names)))
        else:
            text, repeated = _strings(request, file, table, rows)
            request.rows_met[file] += len(repeated) - len(rows)
            cells.append(text)
            numbers.append(repeated)
    if not num_rows:
        raise CorpusError(
            f"{request.input} holds no Parquet file with rows and a column {request.columns.image!r} of images; name "
            "the column with columns.image="
        )
    if not cells:
        request.note_map_unused()
        table = prepared.table()
        return RawRows(table, (), read_tree(request), captions_from(table, {}))
    others = csv.interpret(
        request, Blocks.of(_blocks(request.input, cells.table(), pa.concat_arrays(numbers))), "parquet"
    )
    if not prepared:
        return others
    table = pa.concat_tables([prepared.table(), others.table]).sort_by("row").combine_chunks()
    return replace(others, table=table)


def _blocks(uri: str, cells: pa.Table, rows: pa.Array) -> Iterator[StringTable]:
    """The rows of all files as text, and their numbers, in blocks."""
    begin = 0
    for block in blocks(cells, tables.MAX_ROWS):
        filled = {name: pc.fill_null(block[name], "") for name in block.column_names}
        yield StringTable(uri, pa.table(filled), rows[begin : begin + block.num_rows], ())
        begin += block.num_rows


def files_of(request: SourceRequest) -> list[str]:
    """The Parquet files below the input in the order of their paths, or `request.table` alone.

    Raises:
        CorpusError: there is none.
        StorageError: the input cannot be listed.
    """
    if request.table:
        return [request.table]
    root = request.input.rstrip("/")
    files = [uri[len(root) + 1 :] for uri in storage.list_files(root, recursive=True)]
    request.findings.passed_over.update(left_behind for file in files if (left_behind := litter(file)))
    files = [file for file in files if file.lower().endswith(".parquet") and litter(file) is None]
    if not files:
        raise CorpusError(f"{request.input} holds no .parquet file")
    return files


def read_file(request: SourceRequest, file: str) -> tuple[pa.Table | None, bool]:
    """A file's rows, its images as addresses, and whether they are prepared samples; None if it has no images.

    Raises:
        CorpusError: it is absent or damaged.
        StorageError: it cannot be read.
    """
    uri, column = storage.join(request.input, file), request.columns.image

    def read() -> tuple[pa.Table | None, bool]:
        with parquet_images.open_file(uri) as (parquet, content):
            schema = parquet.schema_arrow
            if column not in parquet_images.image_columns(schema):
                return None, False
            if "/" in column or column in (".", ".."):
                raise CorpusError(f"{uri}: a column of images cannot be called {column!r}; rename it")
            is_prepared = _is_prepared(uri, schema)
            images = pa.array(list(_addresses(parquet, content, file, column)), pa.string())
            others = list(FIELDS) if is_prepared else [name for name in schema.names if name != column]
            table = parquet.read(columns=others, use_threads=False)
            for name in sorted(NEWER.difference(table.column_names)) if is_prepared else ():
                table = table.append_column(RAW.field(name), pa.nulls(table.num_rows, RAW.field(name).type))
            return table.append_column(pa.field(column, pa.string()), images), is_prepared

    try:
        return storage.with_retries(read, uri)
    except FileNotFoundError:
        raise CorpusError(f"{uri} does not exist: a Parquet file is expected there (see table=)") from None


def _is_prepared(uri: str, schema: pa.Schema) -> bool:
    """True for a file that has all of a prepared sample's columns and says so."""
    version = (schema.metadata or {}).get(VERSION_KEY.encode(), b"").decode()
    if not version or not set(FIELDS) - NEWER <= set(schema.names):
        return False
    if version != str(SCHEMA_VERSION):
        raise CorpusError(f"{uri} holds samples of schema {version}, this code reads {SCHEMA_VERSION}; export it again")
    return True


def _addresses(parquet: pq.ParquetFile, content: BinaryIO, file: str, column: str) -> Iterator[str | None]:
    """The path of each row's image: in this file, or the file that the row names instead of holding it."""
    paths = _paths(parquet, column)
    for group in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        found = parquet_images.places(parquet, content, group, column)
        for row, path in enumerate(islice(paths, num_rows)):
            name = f"{column}/{_name(path) or row}"
            if found is None:
                yield f"{file}!g{group}r{row}/{name}"
            else:
                place = found[row]
                yield path if place is None else f"{file}!{place.offset}+{place.size}/{name}"


def _paths(parquet: pq.ParquetFile, column: str) -> Iterator[str | None]:
    """The path that each row gives its image, None where it gives none."""
    kind = parquet.schema_arrow.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return repeat(None, parquet.metadata.num_rows)
    structs = parquet.read(columns=[f"{column}.path"], use_threads=False)[column].combine_chunks()
    return iter(pc.struct_field(structs, "path").to_pylist())


def _name(path: str | None) -> str | None:
    """The last part of an image's path, if it can be that of an address."""
    name = posixpath.basename(path or "")
    return None if name in ("", ".", "..") or "\0" in name else name


def _strings(request: SourceRequest, file: str, table: pa.Table, rows: pa.Array) -> tuple[pa.Table, pa.Array]:
    """A file's rows as text, as `csv` reads them, and their numbers; each of several captions has a row of its own."""
    wanted = request.columns.caption
    class_names = _class_names(table.schema)
    if wanted in table.column_names and _is_list(table.schema.field(wanted).type):
        captions = [cell or [None] for cell in table[wanted].to_pylist()]
        parents = pa.array(np.repeat(np.arange(len(captions)), [len(cell) for cell in captions]))
        place = table.column_names.index(wanted)
        table = table.take(parents).set_column(place, wanted, pa.array([text for cell in captions for text in cell]))
        rows = rows.take(parents)
    for name in set(parquet_images.image_columns(table.schema)) - {request.columns.image}:
        request.findings.not_read[f"images of the column {name!r}; columns.image= says which are read"] += len(table)
    cells = {
        name: _text(table[name].combine_chunks(), class_names.get(name))
        for name in table.column_names
        if name not in parquet_images.image_columns(table.schema)
    }
    if SPLIT not in cells:
        cells[SPLIT] = pa.repeat(split_of_file(file) or "", table.num_rows)
    return pa.table(cells), rows


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of Hugging Face's `ClassLabel` columns, whose cells are numbers."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), "huggingface")["info"]["features"]
        named = {name: _names_of(feature) for name, feature in features.items()}
    except (DocumentError, KeyError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in named.items() if names}


def _names_of(feature: Any) -> list[str] | None:
    """The names of a feature's classes, or of its items' where it is one of lists."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) else None


def _text(column: pa.Array, class_names: list[str] | None) -> pa.Array:
    """Any column as text: numbers as written, class labels by name, lists joined with commas, structs as JSON."""

    def show(value: Any) -> str:
        if value is None:
            return ""
        if class_names and isinstance(value, int):
            # A number without a name stays, to be told as a label that names nothing; -1 is a row without one.
            return str(class_names[value]) if 0 <= value < len(class_names) else str(value)
        if isinstance(value, list) and not any(isinstance(each, dict | list) for each in value):
            return ", ".join(show(each) for each in value if each is not None)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    if pa.types.is_string(column.type):
        return pc.fill_null(column, "")
    return pa.array([show(value) for value in column.to_pylist()], pa.string())


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
