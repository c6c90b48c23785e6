"""WebDataset: .tar archives whose files of one name are one sample (`000012.jpg`, `000012.txt`, `000012.json`).

What follows the last dot of a name is the kind of the file, so that keys may hold dots; a sample's files may lie apart.
Every `*.tar` below the input is read, in the order of their paths; nothing is unpacked. `.txt` is a caption. `.json`
may hold more of them in caption, text and captions (each a text, {aspect, text}, or a list of these; equal ones are
one), label and labels, concepts, skin_type, split, source, source_id, age, sex, body_site, symptoms, patient_id,
lesion_id, group, modality; whatever else it holds is kept in `meta.extra`, and so is what of these fields is not
understood, which is told. Where a sample names no split, the archive's name or folder may (`test-0003.tar`,
`val/0.tar`), unless all that they tell is train. A sample without a caption takes the published sentence over its
labels. Row numbers count the samples. A `.json` that jobs/export.py has written (`dermray` in it) gives the prepared
sample back.
"""

from __future__ import annotations

import json
import math
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus import exchange
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CAPTION, CAPTION_ASPECTS
from dermray.documents import parse_json
from dermray.errors import CorpusError, DocumentError
from dermray.raw.archives import LEFT_OUT, heads, inside, join_address, open_tar, tar_member
from dermray.raw.cells import written_list
from dermray.raw.litter import litter
from dermray.raw.sources.pictures import modalities
from dermray.raw.sources.places import PHOTOGRAPH_ENDINGS, ending_of
from dermray.raw.sources.rows import (
    PATIENT_FIELDS,
    PREPARED,
    DroppedRow,
    Findings,
    RawRows,
    SourceRequest,
    assemble,
    captions_from,
    first_of,
    merged_counts,
    meta,
    of_patients,
    prepared_rows,
    raw_captions,
    text,
)
from dermray.raw.sources.sentences import label_sentences
from dermray.raw.sources.tables import read_tree
from dermray.raw.splits import split_of_file

MAX_TEXT_BYTES = 4 << 20
# Of one archive: they are all held until its last file is read.
MAX_TEXTS_BYTES = 2 << 30
TEXTS = (".txt", ".json")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
IMAGE = "image"
# Columns that are no strings.
SAMPLE_TYPES = {
    "row": pa.int64(),
    "captions": pa.list_(CAPTION),
    "labels": pa.list_(pa.string()),
    "concepts": pa.list_(pa.string()),
}
META = ("body_site", "symptoms", "patient_id", "lesion_id")
CAPTIONS = ("caption", "text", "captions")
LABELS = ("labels", "label")
# Fields that hold one value.
SINGLE = (*META, *PATIENT_FIELDS, "group", "split", "source", "source_id")
USED = {*CAPTIONS, *LABELS, *SINGLE, "concepts", "key"}


def read(request: SourceRequest) -> RawRows:
    """Read the texts and the places of the images of all archives under `request.input` (or of `request.table` alone).

    Raises:
        CorpusError: there is no tar archive, none holds a sample, or one is cut off or compressed.
        OntologyError: `ontology.json` lies there and is malformed.
        StorageError: an archive cannot be read.
    """
    tables: list[pa.Table] = []
    told: list[Mapping[str, Mapping[str, int]]] = []
    dropped: list[DroppedRow] = []
    row = 0
    tars = _tars(request)
    splits = {tar: split_of_file(tar) for tar in tars}
    if set(splits.values()) <= {None, "train"}:
        # Then other splits are to be drawn from them.
        splits = dict.fromkeys(tars)
    for tar in tars:
        samples: list[dict[str, Any]] = []
        prepared: list[dict[str, Any]] = []
        grouped = _grouped(storage.join(request.input, tar), request.findings)
        grouped = grouped[: None if request.limit is None else request.limit - row]
        request.rows_met[tar] = len(grouped)
        for key, files in grouped:
            row += 1
            sample_id = f"{tar}!/{key}"
            try:
                document, caption = _texts(files, request.findings)
                image = join_address(tar, files[IMAGE]) if IMAGE in files else None
                if exchange.is_document(document):
                    prepared.append({"row": row, "image": image, **exchange.from_document(document)})
                else:
                    sample = _sample(sample_id, document, caption)
                    samples.append({"row": row, "image": image, **sample, "split": sample["split"] or splits[tar]})
                    _note_placeholders(request.findings, document)
            except ValueError as error:
                dropped.append(DroppedRow(row, sample_id, "", "malformed_row", f"{sample_id}: {error}"))
        rows, not_understood = _rows(samples, request.findings)
        told.append(not_understood)
        tables.extend((rows, prepared_rows(pa.Table.from_pylist(prepared, PREPARED))))
    if not row:
        raise CorpusError(f"the .tar archives of {request.input} hold no samples")
    tree = read_tree(request)
    table = _with_sentences(pa.concat_tables(tables).sort_by("row").combine_chunks(), tree)
    made = captions_from(table, {"raw": ".txt, and caption, text and captions of .json"})
    return RawRows(table, tuple(dropped), tree, made, merged_counts(told))


def _with_sentences(table: pa.Table, tree: Ontology | None) -> pa.Table:
    """The table with the published sentence over the labels where a row has no caption and was not prepared before."""
    captions = table["captions"].combine_chunks()
    lacking = pc.and_(pc.equal(pc.list_value_length(captions), 0), pc.is_null(table["prepared"].combine_chunks()))
    sentences = raw_captions(label_sentences(table["labels"].combine_chunks(), tree))
    filled = pc.if_else(lacking, sentences, captions)
    return table.set_column(table.column_names.index("captions"), table.schema.field("captions"), filled)


def _tars(request: SourceRequest) -> list[str]:
    if request.table:
        return [request.table]
    files = [uri[len(request.input.rstrip("/")) + 1 :] for uri in storage.list_files(request.input, recursive=True)]
    request.findings.passed_over.update(left_behind for file in files if (left_behind := litter(file)))
    files = [file for file in files if not litter(file)]
    tars = [file for file in files if file.lower().endswith(".tar")]
    packed = [file for file in files if file.lower().endswith(COMPRESSED)]
    if not tars:
        hint = f"; {packed[0]} is compressed: gunzip it, to be read in place" if packed else ""
        raise CorpusError(f"{request.input} holds no .tar archive{hint}")
    if packed:
        request.findings.not_read["compressed .tar archives, which must be gunzipped first"] += len(packed)
    return tars


def _grouped(uri: str, findings: Findings) -> list[tuple[str, dict[str, Any]]]:
    """The samples of an archive in the order of their first files: key, and by ending a text or the image's member.

    A file of a kind that its sample has already begins another sample of the same key, as archives that were joined
    hold them, unless the two lie side by side: then it is one too many. Litter, and what is no image and no text, is
    counted in `findings`.

    Raises:
        CorpusError: there is no such archive, it is cut off, or its texts are too large for it to be one of samples.
    """
    samples: list[tuple[str, dict[str, Any]]] = []
    latest: dict[str, int] = {}
    num_bytes, before = 0, ""
    try:
        with open_tar(uri) as archive:
            for info in heads(archive, uri):
                if info.isdir():
                    continue
                normal = inside(info.name) if info.isreg() else None
                if normal is None:
                    findings.not_read[LEFT_OUT] += 1
                    continue
                if (left_behind := litter(normal)) is not None:
                    findings.passed_over[left_behind] += 1
                    continue
                key, kind = _key_and_kind(normal)
                if kind is None:
                    findings.not_read[ending_of(normal)] += 1
                    continue
                files = samples[latest[key]][1] if key in latest else None
                if files is None or (kind in files and key != before):
                    latest[key] = len(samples)
                    files = {}
                    samples.append((key, files))
                before = key
                if kind in files:
                    findings.not_read[f"a second {kind} of one sample"] += 1
                elif kind == IMAGE:
                    files[kind] = tar_member(info)._replace(name=normal)
                else:
                    files[kind] = _text_of(archive, info)
                    num_bytes += len(files[kind] or b"")
                    if num_bytes > MAX_TEXTS_BYTES:
                        raise CorpusError(f"{uri} holds more than {MAX_TEXTS_BYTES:,} bytes of texts; split it")
    except FileNotFoundError:
        raise CorpusError(f"{uri} does not exist: a .tar archive is expected there (see table=)") from None
    return [(key, files) for key, files in samples if not _is_beside(key, files, samples, latest, findings)]


def _is_beside(
    key: str,
    files: Mapping[str, Any],
    samples: list[tuple[str, dict[str, Any]]],
    latest: Mapping[str, int],
    findings: Findings,
) -> bool:
    """Whether an image lies beside a sample that has a text and is none itself: `a.seg.png` by `a.jpg` and `a.txt`."""
    main, _, word = key.rpartition(".")
    if set(files) != {IMAGE} or main not in latest or not set(samples[latest[main]][1]) & set(TEXTS):
        return False
    findings.not_read[f".{word}{posixpath.splitext(files[IMAGE].name)[1]}"] += 1
    return True


def _key_and_kind(name: str) -> tuple[str, str | None]:
    """What a member belongs to, and its kind: `image`, `.txt`, `.json`, or None for any other."""
    key, ending = posixpath.splitext(name)
    ending = ending.lower()
    return key, ending if ending in TEXTS else IMAGE if ending in PHOTOGRAPH_ENDINGS else None


def _text_of(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
    """A text's bytes; None if there are too many."""
    content = archive.extractfile(info) if info.size <= MAX_TEXT_BYTES else None
    return content.read() if content else None


def _texts(files: dict[str, Any], findings: Findings) -> tuple[dict[str, Any], str | None]:
    """A sample's .json, empty where there is none, and its .txt.

    Raises:
        ValueError: its texts are too long, not UTF-8 or not JSON.
    """
    for ending in TEXTS:
        if ending in files and files[ending] is None:
            raise ValueError(f"its {ending} has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        document = parse_json(files.get(".json", b"{}"), "its .json", findings.doubled_keys)
        caption = files[".txt"].decode("utf-8-sig") if ".txt" in files else None
    except DocumentError as error:
        raise ValueError(str(error)) from None
    if not isinstance(document, dict):
        raise ValueError("its .json is no object")
    return document, caption


def _sample(sample_id: str, document: dict[str, Any], caption: str | None) -> dict[str, Any]:
    """One sample as a dict of plain values; `unread` is what of its fields is not understood, by their names."""
    captions = _captions(document, caption)
    labels = _several(document, LABELS, _strings)
    concepts = _several(document, ("concepts",), _concepts)
    single = {name: value for name in SINGLE if _says(value := document.get(name)) and _string(value) is None}
    unread = {**captions.unread, **labels.unread, **concepts.unread, **single}
    others = {name: value for name, value in document.items() if name not in USED}
    # It stays in `extra` too, as it is written: its reading is one of few words.
    kind = document.get("modality")
    return {
        **{name: _string(document.get(name)) for name in (*META, *PATIENT_FIELDS, "group", "split")},
        "modality": _string(kind) or (json.dumps(_kept(kind)) if _says(kind) else None),
        "source": _string(document.get("source")) or "webdataset",
        "source_id": _string(document.get("source_id")) or sample_id,
        "captions": captions.found,
        "labels": labels.found,
        "concepts": concepts.found,
        "extra": {name: kept for name, value in {**others, **unread}.items() if (kept := _kept(value)) is not None},
        "unread": unread,
    }


class _Several(NamedTuple):
    """What fields of several values come to, each once, and by field the values that are not understood."""

    found: list[Any]
    unread: dict[str, Any]


def _several(document: Mapping[str, Any], names: Iterable[str], read: Callable[[Any], list[Any] | None]) -> _Several:
    """The values of some fields, which may be lists, as `read` understands each: None if it does not."""
    found: list[Any] = []
    unread: dict[str, Any] = {}
    for name in names:
        said = document.get(name)
        for value in said if isinstance(said, list) else [said]:
            parts = read(value) if _says(value) else []
            if parts is None:
                unread.setdefault(name, []).append(value)
            found.extend(part for part in parts or () if part not in found)
    return _Several(found, unread)


def _says(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _kept(value: Any) -> Any:
    """A value of a document as `extra` keeps it, None for nothing; JSON has no word for numbers without an end."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        value = {name: _kept(each) for name, each in value.items()}
    elif isinstance(value, list):
        value = [_kept(each) for each in value]
    return value if _says(value) else None


def _labels(document: Mapping[str, Any]) -> list[Any]:
    """What `labels` and `label` say, one after the other: a document may hold both."""
    said = [document.get(name) for name in LABELS]
    return [each for one in said for each in (one if isinstance(one, list) else [one])]


def _note_placeholders(findings: Findings, document: Mapping[str, Any]) -> None:
    cells = [_string(each) for each in _labels(document)]
    findings.count_placeholders(pa.array(cells, pa.string()))


def _captions(document: dict[str, Any], caption: str | None) -> _Several:
    """The captions of `.txt` and of the document, plain ones first; of one text only one, with its aspect."""
    said = _several(document, CAPTIONS, _said)
    found = [*((caption is not None and _said(caption)) or ()), *said.found]
    named = {each["text"] for each in found if each["aspect"] != "raw"}
    kept = [each for each in found if each["aspect"] != "raw" or each["text"] not in named]
    return _Several(list({(each["aspect"], each["text"]): each for each in kept}.values()), said.unread)


def _said(value: Any) -> list[dict[str, str]] | None:
    """The captions that a text, {aspect, text} or {aspect: text, …} gives, without blank ones; None: not understood."""
    if isinstance(value, dict):
        if "text" in value:
            value = {value.get("aspect") or "raw": value["text"]}
        told = list(value.items())
    else:
        items = _listed(value)
        told = [("raw", each) for each in ([value] if items is None else items)]
    if not all(aspect in CAPTION_ASPECTS and (each is None or _string(each) is not None) for aspect, each in told):
        return None
    cells = text(pa.array([_string(each) for _, each in told], pa.string())).to_pylist()
    return [{"aspect": aspect, "text": cell} for (aspect, _), cell in zip(told, cells, strict=True) if cell]


def _listed(value: Any) -> list[str] | None:
    """The items of a list that stands as a text (`['Eczema', 'Psoriasis']`); None if it is none."""
    return written_list(value) if isinstance(value, str) else None


def _string(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _strings(value: Any) -> list[str] | None:
    """The texts of a value, without placeholders; None if it is no text or number."""
    if _string(value) is None:
        return None
    items = _listed(value)
    strings = text(pa.array([_string(value)] if items is None else items, pa.string())).to_pylist()
    return list(filter(None, strings))


def _concepts(value: Any) -> list[str] | None:
    """As `_strings`, in lower case; a text may name several, separated by commas."""
    found = _strings(value)
    return (
        None
        if found is None
        else [name for each in found for part in each.lower().split(",") if (name := part.strip())]
    )


def _rows(samples: list[dict[str, Any]], findings: Findings) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """Samples as a table of raw rows, and what they say of patients that is not understood."""

    def column(name: str) -> pa.Array:
        return pa.array([sample[name] for sample in samples], SAMPLE_TYPES.get(name, pa.string()))

    patients, lesions = text(column("patient_id")), text(column("lesion_id"))
    said = of_patients(len(samples), **{name: column(name) for name in PATIENT_FIELDS})
    written = zip(*(said.as_written.get(name, [None] * len(samples)) for name in PATIENT_FIELDS), strict=True)
    for sample, cells in zip(samples, written, strict=True):
        kept = {name: cell.as_py() for name, cell in zip(PATIENT_FIELDS, cells, strict=True) if cell is not None}
        sample["extra"] |= {name: cell for name, cell in kept.items() if cell is not None}
    extra = [json.dumps(each["extra"], ensure_ascii=False) if each["extra"] else None for each in samples]
    table = assemble(
        **{name: column(name) for name in ("source", "source_id", "image", *SAMPLE_TYPES)},
        skin_type=said.skin_type,
        group=first_of(text(column("group")), patients, lesions),
        split=text(column("split")),
        modality=modalities(findings, "modality", column("modality"), column("row")),
        meta=meta(
            len(samples),
            age=said.age,
            sex=said.sex,
            **{name: text(column(name)) for name in META},
            extra=pa.array(extra, pa.string()),
        ),
    )
    unread = (
        {name: {json.dumps(_kept(value), ensure_ascii=False): 1} for name, value in each["unread"].items()}
        for each in samples
    )
    return table, merged_counts([said.not_understood, *unread])
