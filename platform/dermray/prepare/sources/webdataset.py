"""WebDataset: .tar archives whose files of one name are one sample (`000012.jpg`, `000012.txt`, `000012.json`).

Every `*.tar` below the input is read, in the order of their paths; nothing is unpacked. `.txt` is the caption. `.json`
may hold caption or text (where there is no .txt), captions (a list of {aspect, text}), label or labels, concepts,
skin_type, split, source, source_id, age, sex, body_site, symptoms, patient_id, lesion_id, group; its other simple
values are kept in `meta.extra`. A sample without .txt and caption takes the published sentence over its labels. Row
numbers count the samples. A `.json` that jobs/export.py has written (`dermray` in it) gives the prepared sample back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from dermray import storage
from dermray.corpus import exchange
from dermray.corpus.captions import ontology_caption
from dermray.corpus.schema import CAPTION, CAPTION_ASPECTS
from dermray.errors import CorpusError
from dermray.prepare.archives import inside, join_address, open_tar, tar_member
from dermray.prepare.sources.places import IMAGE_ENDINGS
from dermray.prepare.sources.rows import (
    PREPARED,
    DroppedRow,
    RawRows,
    SourceRequest,
    assemble,
    captions_from,
    first_of,
    meta,
    prepared_rows,
    skin_types,
    text,
    years,
)
from dermray.prepare.sources.tables import read_tree

MAX_TEXT_BYTES = 4 << 20
# Columns that are no strings.
SAMPLE_TYPES = {
    "row": pa.int64(),
    "captions": pa.list_(CAPTION),
    "labels": pa.list_(pa.string()),
    "concepts": pa.list_(pa.string()),
}
META = ("sex", "body_site", "symptoms", "patient_id", "lesion_id")
USED = {
    *("caption", "text", "captions", "label", "labels", "concepts", "skin_type", "split", "source", "source_id"),
    *("age", "group", "key", *META),
}


def read(request: SourceRequest) -> RawRows:
    """Read the texts and the places of the images of all archives under `request.input` (or of `request.table` alone).

    Raises:
        CorpusError: there is no tar archive, none holds a sample, or one is cut off or compressed.
        OntologyError: `ontology.json` lies there and is malformed.
        StorageError: an archive cannot be read.
    """
    tables: list[pa.Table] = []
    dropped: list[DroppedRow] = []
    row = 0
    for tar in _tars(request):
        samples: list[dict[str, Any]] = []
        prepared: list[dict[str, Any]] = []
        grouped = _grouped(storage.join(request.input, tar))
        for key, files in grouped if request.limit is None else islice(grouped, request.limit - row):
            row += 1
            sample_id = f"{tar}!/{key}"
            try:
                document, caption = _texts(files)
                image = join_address(tar, files["image"]) if "image" in files else None
                if exchange.is_document(document):
                    prepared.append({"row": row, "image": image, **exchange.from_document(document)})
                else:
                    samples.append({"row": row, "image": image, **_sample(sample_id, document, caption)})
            except ValueError as error:
                dropped.append(DroppedRow(row, sample_id, "", "malformed_row", f"{sample_id}: {error}"))
        tables.extend((_rows(samples), prepared_rows(pa.Table.from_pylist(prepared, PREPARED))))
    if not row:
        raise CorpusError(f"the .tar archives of {request.input} hold no samples")
    table = pa.concat_tables(tables).sort_by("row").combine_chunks()
    made = captions_from(table, {"raw": ".txt, or caption of .json"})
    return RawRows(table, tuple(dropped), read_tree(request), made)


def _tars(request: SourceRequest) -> list[str]:
    if request.table:
        return [request.table]
    files = [uri[len(request.input.rstrip("/")) + 1 :] for uri in storage.list_files(request.input, recursive=True)]
    tars = [file for file in files if file.lower().endswith(".tar")]
    if not tars:
        packed = next((file for file in files if file.lower().endswith((".tar.gz", ".tgz"))), None)
        hint = f"; {packed} is compressed: gunzip it, to be read in place" if packed else ""
        raise CorpusError(f"{request.input} holds no .tar archive{hint}")
    return tars


def _grouped(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The samples of an archive in its order: their key, and by ending the member of the image or a text."""
    key, files = "", dict[str, Any]()
    try:
        with open_tar(uri) as archive:
            for info in archive:
                normal = inside(info.name) or ""
                folder, _, name = normal.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not info.isreg() or not dot or not stem:
                    continue
                here = f"{folder}/{stem}" if folder else stem
                if here != key:
                    if files:
                        yield key, files
                    key, files = here, {}
                ending = f".{ending.lower()}"
                if ending in (".txt", ".json"):
                    content = archive.extractfile(info) if info.size <= MAX_TEXT_BYTES else None
                    files[ending] = content.read() if content else None
                elif ending in IMAGE_ENDINGS:
                    files.setdefault("image", tar_member(info)._replace(name=normal))
    except FileNotFoundError:
        raise CorpusError(f"{uri} does not exist: a .tar archive is expected there (see table=)") from None
    if files:
        yield key, files


def _texts(files: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A sample's .json, empty where there is none, and its .txt.

    Raises:
        ValueError: its texts are too long, not UTF-8 or not JSON.
    """
    for ending in (".txt", ".json"):
        if ending in files and files[ending] is None:
            raise ValueError(f"its {ending} has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        document = json.loads(files.get(".json", b"{}"))
        caption = files[".txt"].decode("utf-8-sig") if ".txt" in files else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its .json cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ValueError("its .json is no object")
    return document, caption


def _sample(sample_id: str, document: dict[str, Any], caption: str | None) -> dict[str, Any]:
    """One sample as a dict of plain values."""
    captions = _captions(document, caption)
    labels = _strings(document.get("labels", document.get("label")))
    sentence = ontology_caption(labels)
    if not captions and sentence:
        captions = [{"aspect": "raw", "text": sentence}]
    extra = {
        name: value
        for name, value in document.items()
        if name not in USED and isinstance(value, str | int | float | bool) and value != ""
    }
    return {
        **{name: _string(document.get(name)) for name in (*META, "group", "split", "age", "skin_type")},
        "source": _string(document.get("source")) or "webdataset",
        "source_id": _string(document.get("source_id")) or sample_id,
        "captions": captions,
        "labels": labels,
        "concepts": _strings(document.get("concepts")),
        "extra": json.dumps(extra, ensure_ascii=False) if extra else None,
    }


def _captions(document: dict[str, Any], caption: str | None) -> list[dict[str, str]]:
    listed = document.get("captions")
    found = [
        {"aspect": each["aspect"], "text": " ".join(each["text"].split())}
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict) and each.get("aspect") in CAPTION_ASPECTS and isinstance(each.get("text"), str)
    ]
    if caption is None:
        caption = _string(document.get("caption")) or _string(document.get("text"))
    (plain,) = text(pa.array([caption], pa.string())).to_pylist()
    if plain and all(each["text"] != plain for each in found):
        found.insert(0, {"aspect": "raw", "text": plain})
    return [each for each in found if each["text"]]


def _string(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    strings = text(pa.array([_string(each) for each in values], pa.string())).to_pylist()
    return list(dict.fromkeys(filter(None, strings)))


def _rows(samples: list[dict[str, Any]]) -> pa.Table:
    def column(name: str) -> pa.Array:
        return pa.array([sample[name] for sample in samples], SAMPLE_TYPES.get(name, pa.string()))

    patients, lesions = text(column("patient_id")), text(column("lesion_id"))
    return assemble(
        **{name: column(name) for name in ("source", "source_id", "image", *SAMPLE_TYPES)},
        skin_type=skin_types(column("skin_type")),
        group=first_of(text(column("group")), patients, lesions),
        split=text(column("split")),
        meta=meta(
            len(samples),
            age=years(column("age")),
            **{name: text(column(name)) for name in META},
            extra=column("extra"),
        ),
    )
