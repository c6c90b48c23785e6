"""What every source reader returns: raw rows in one Arrow schema, and the column operations to get there.

A reader says where things are in its table; what a caption, a label or a group is, is the same for all from here on.
Everything works on whole Arrow columns: a table has a million rows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dermray.config import Config
from dermray.corpus import patients
from dermray.corpus.captions import ontology_caption
from dermray.corpus.exchange import FIELDS
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CAPTION, CAPTION_ASPECTS, META, MODALITY, CaptionAspect
from dermray.corpus.spelling import is_placeholder
from dermray.raw.cells import captions_in, written_list
from dermray.raw.tables import DroppedRow

ResultT = TypeVar("ResultT")

RAW = pa.schema(
    [
        # Number of the row in its table, the first row after the header being 1.
        pa.field("row", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        # Path of the image under the input root; null where the table gives none.
        pa.field("image", pa.string()),
        pa.field("captions", pa.list_(CAPTION), nullable=False),
        # Disease labels as written; one text may list several, separated by commas.
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        # Published path of the diagnosis, coarse to fine, separated by commas.
        pa.field("hierarchy", pa.string()),
        pa.field("concepts", pa.list_(pa.string()), nullable=False),
        pa.field("skin_type", pa.int8()),
        # Samples of one group (patient, lesion, video, …) never part over splits.
        pa.field("group", pa.string()),
        # A split that the source itself prescribes.
        pa.field("split", pa.string()),
        # Where the source found the image (forum, textbook, …), for the report.
        pa.field("origin", pa.string()),
        pa.field("meta", META),
        # True for a sample of a prepared corpus that comes back: its labels are nodes, and no sentence is made for it.
        pa.field("prepared", pa.bool_()),
        # Of such a sample its perceptual hash.
        pa.field("phash", pa.uint64()),
        # What kind of picture it is, where the table says it or the layout guarantees it; never in place of a cell that
        # says more (`digests.row_digest`).
        MODALITY,
    ]
)
# What `prepared_rows` takes.
PREPARED = pa.schema([RAW.field(name) for name in ("row", "image", *FIELDS)])

# Why a row is left out although nothing is wrong with it: it does not count towards the limit on bad rows.
EXCLUDED = "excluded_by_source"
# Where the captions of samples that were prepared before are from.
FROM_EXPORT: dict[CaptionAspect, str] = dict.fromkeys(CAPTION_ASPECTS, "as in the prepared corpus that was exported")
FROM_DIAGNOSIS: dict[CaptionAspect, str] = {"raw": "the published sentence over the diagnosis"}


class Columns(Config):
    """Column names of a `csv` table. A column named here must exist; a default name is used where it exists."""

    image: str = Field("image", description="path of the image under input")
    caption: str | None = Field("caption", description="caption; empty: made from the label")
    label: str | list[str] | None = Field("label", description="disease label, or a list of such columns")
    label_separator: str | None = Field(None, description="what separates several labels in a cell; empty: nothing")
    label_map: str | None = Field(
        None, description="CSV under input or elsewhere, columns label and means: what label texts stand for"
    )
    concepts: str | None = Field("concepts", description="visible features, separated by commas")
    skin_type: str | None = Field("skin_type", description="Fitzpatrick type: 1-6 or I-VI")
    group: str | list[str] | None = Field("group", description="what must not part over splits: patient, lesion, …")
    split: str | None = Field("split", description="split that the row must be in")
    source: str | None = Field("source", description="name of the data set a row is from")
    source_id: str | None = Field("source_id", description="id of the row in its data set; else the image path")
    age: str | None = Field("age", description="age in years")
    sex: str | None = Field("sex", description="sex or gender")
    body_site: str | None = Field("body_site", description="where on the body")
    symptoms: str | None = Field("symptoms", description="symptoms")
    patient_id: str | None = Field("patient_id", description="patient; groups the rows where group is absent")
    lesion_id: str | None = Field("lesion_id", description="lesion; groups the rows where group and patient are absent")
    modality: str | None = Field("modality", description="kind of picture: clinical, dermoscopic, …")


DEFAULT_COLUMNS = Columns()
# What a table may say of a patient: how a cell is read, and as what it is kept.
PATIENT_FIELDS: dict[str, tuple[Callable[[str], Any], pa.DataType]] = {
    "age": (patients.age_years, pa.float32()),
    "sex": (patients.sex, pa.string()),
    "skin_type": (patients.skin_type, pa.int8()),
}


@dataclass(frozen=True)
class RawTable:
    """A file of the input that was read as a whole: a table, or the disease tree. `sha256` (hex) is of these bytes."""

    uri: str
    num_bytes: int
    sha256: str


@dataclass
class Findings:
    """What a reader meets and nobody asked about.

    Attributes:
        passed_over: files that systems and programs leave behind, by what tells them.
        not_read: files that the reader knows no use for, by what they are.
        ambiguous: paths of images that several files may mean, each with these.
        placeholders: labels that only stand for nothing ("nan", "unknown", -1, …), and how often each occurs.
        unused: cells of the table, and rows of those beside it, that give nothing to any sample, by what they are.
        extra_columns: columns of a table of one's own that nothing names, so that they are only kept in `extra`.
        map_rows_matched: texts of those rows of `columns.label_map` that a label of the table is.
        map_rows_unused: texts of the rows of `columns.label_map` that no label of the table is.
        doubled_keys: keys that stand twice in one object of JSON, of which the last counts, and in how many objects.
        unread_modalities: texts of a column of modalities that no reading fits, each with its column, and how often.
        unread_modality_rows: the first rows that hold them.
    """

    passed_over: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    placeholders: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    extra_columns: list[str] = field(default_factory=list)
    map_rows_matched: set[str] = field(default_factory=set)
    map_rows_unused: list[str] = field(default_factory=list)
    doubled_keys: Counter[str] = field(default_factory=Counter)
    unread_modalities: Counter[str] = field(default_factory=Counter)
    unread_modality_rows: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, Mapping[str, int]]:
        """What was found, for the report: kind → text → how often; a name of a column or a text of a map counts 1."""
        return {
            "files passed over, which systems and programs leave behind": self.passed_over,
            "files not read, which the source knows no use for": self.not_read,
            "not used, or perhaps not as it is meant": +self.unused,
            "columns that nothing names, only kept in meta.extra": dict.fromkeys(self.extra_columns, 1),
            "keys that stand twice in one object of JSON": self.doubled_keys,
            "modalities that are not understood, only kept in meta.extra": self.unread_modalities,
            "rows of columns.label_map that match no label": Counter(self.map_rows_unused),
        }

    def count_placeholders(self, labels: pa.Array, separator: str | None = None) -> None:
        """Note those of a column of label cells as they were read; blank ones are none."""
        for cell in pc.value_counts(labels.drop_null()).to_pylist():
            for part in parts_of(cell["values"], separator):
                if (plain := part.strip().lower()) and is_placeholder(plain):
                    self.placeholders[plain] += cell["counts"]


class Tasks(Protocol):
    """Has pieces of a table done somewhere, in any order; gives name and result of each. All of them are picklable."""

    def __call__(self, pieces: Mapping[str, Any], work: Callable[[Any], ResultT]) -> Iterator[tuple[str, ResultT]]:
        """Do them."""
        ...


@dataclass(frozen=True)
class SourceRequest:
    """What a reader is asked for. `tasks` may read a long table piece by piece; empty: the reader does so itself.

    Filled while it reads: `tables`, what it has read as a whole, by URI, `findings`, and `rows_met`, the rows that each
    file holds, counted where they are met: `sources.read` holds them against what the reader returns.
    """

    input: str
    table: str | None = None
    columns: Columns = DEFAULT_COLUMNS
    limit: int | None = None
    keep_untexted: bool = False
    tasks: Tasks | None = field(default=None, compare=False)
    tables: dict[str, RawTable] = field(default_factory=dict, compare=False)
    findings: Findings = field(default_factory=Findings, compare=False)
    rows_met: Counter[str] = field(default_factory=Counter, compare=False)

    def note_map_unused(self) -> None:
        """Have it told that samples of an exported corpus keep their labels, whatever the map says."""
        if self.columns.label_map:
            self.findings.unused["columns.label_map, since the samples are an exported corpus's"] += 1

    def beside(self, table: str) -> SourceRequest:
        """The same for another table of the source, the whole of it, whose rows become no samples."""
        return replace(self, table=table, limit=None, rows_met=Counter())


@dataclass(frozen=True)
class RawRows:
    """What a reader returns: rows of schema RAW, rows it could not read, and the disease tree if there is one.

    `captions_from` says for each caption aspect that the source brings where it is from, in words, for the provenance.
    `not_understood` counts by field the texts that say something of a patient and that no reading fits.
    """

    table: pa.Table
    dropped: tuple[DroppedRow, ...] = ()
    ontology: Ontology | None = None
    captions_from: Mapping[CaptionAspect, str] = field(default_factory=dict)
    not_understood: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the source's table, readable or not."""
        return self.table.num_rows + len(self.dropped)


def assemble(**columns: Any) -> pa.Table:
    """A table of schema RAW from its columns (arrays, or one string for all rows); absent ones are null or empty."""
    num_rows = len(columns["row"])
    arrays = []
    for described in RAW:
        value = columns.pop(described.name, None)
        if value is None and pa.types.is_list(described.type):
            value = pa.array([[]] * num_rows, described.type)
        elif value is None:
            value = pa.nulls(num_rows, described.type)
        elif isinstance(value, str):
            value = pa.repeat(pa.scalar(value, described.type), num_rows)
        arrays.append(value.cast(described.type) if value.type != described.type else value)
    if columns:
        raise TypeError(f"no such raw columns: {sorted(columns)}")
    return pa.Table.from_arrays(arrays, schema=RAW)


def prepared_rows(samples: pa.Table) -> pa.Table:
    """A table of schema RAW from samples that were prepared before: columns row, image and `exchange.FIELDS`, as is."""
    said = samples["meta"].combine_chunks()
    return assemble(
        **{name: samples[name].combine_chunks() for name in ("row", "image", *FIELDS)},
        group=first_of(pc.struct_field(said, "patient_id"), pc.struct_field(said, "lesion_id")),
        prepared=pa.repeat(pa.scalar(True), samples.num_rows),
    )


def captions_from(table: pa.Table, otherwise: Mapping[CaptionAspect, str]) -> Mapping[CaptionAspect, str]:
    """Where a table's captions are from: the exported corpus if all its rows are from one."""
    return FROM_EXPORT if table.num_rows and not table["prepared"].null_count else otherwise


def meta(num_rows: int, **fields: pa.Array | None) -> pa.Array:
    """The `meta` struct column from its fields; absent ones are null."""
    arrays = [
        pa.nulls(num_rows, part.type) if (given := fields.get(part.name)) is None else given.cast(part.type)
        for part in META
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(META))


def text(column: pa.Array, *, lower: bool = False) -> pa.Array:
    """Runs of white space become one space; blank cells and placeholders ("No age information", …) become null."""

    def clean(cell: str) -> str | None:
        collapsed = " ".join(cell.split())
        if is_placeholder(collapsed):
            return None
        return collapsed.lower() if lower else collapsed

    return map_values(column, clean, pa.string())


def path(column: pa.Array) -> pa.Array:
    """Image paths as they are, but blank ones null: spaces inside a file name are part of it."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.string()), column)


def listed(column: pa.Array, separator: str | None = ",") -> pa.Array:
    """Cells split at a separator, parts stripped, each once, without placeholders; null becomes the empty list.

    A cell that is a list of texts as Python or JSON writes it (`['Eczema', 'Psoriasis']`) is that list.
    """

    def split(cell: str) -> list[str]:
        parts = parts_of(cell, separator)
        return list(dict.fromkeys(part.strip() for part in parts if not is_placeholder(part)))

    split_column = map_values(column, split, pa.list_(pa.string()))
    return pc.fill_null(split_column, pa.scalar([], pa.list_(pa.string()))) if split_column.null_count else split_column


def parts_of(cell: str, separator: str | None) -> list[str]:
    """A cell as Python or JSON writes a list, else split at a separator, else whole."""
    parts = written_list(cell)
    if parts is None:
        parts = cell.split(separator) if separator else [cell]
    return parts


def joined_lists(columns: Sequence[pa.Array]) -> pa.Array:
    """Several list columns end to end, row by row."""
    if len(columns) == 1:
        return columns[0]
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array([[part for parts in row for part in parts] for row in rows], pa.list_(pa.string()))


def raw_captions(column: pa.Array) -> pa.Array:
    """A caption column as `captions`: of aspect `raw`, one a row, several where a cell lists them, none where null."""
    if (lists := _written_lists(column)) is not None:
        return lists
    present = pc.cast(pc.is_valid(column), pa.int32())
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(present)])
    texts = column.drop_null()
    aspects = pa.repeat(pa.scalar("raw"), len(texts))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([aspects, texts], fields=list(CAPTION)))


def _written_lists(column: pa.Array) -> pa.Array | None:
    """`raw_captions` of a column of which cells are lists as Python or JSON writes them; None where none is."""
    if not pc.any(pc.starts_with(column, "[")).as_py():
        return None
    rows = ([] if cell is None else captions_in(cell) for cell in column.to_pylist())
    captions = ([{"aspect": "raw", "text": text} for text in row] for row in rows)
    return pa.array(list(captions), pa.list_(CAPTION))


def diagnosis_sentences(labels: pa.Array) -> pa.Array:
    """For sources without captions: the published sentence over each row's label as its raw caption."""
    return raw_captions(map_values(labels, lambda label: ontology_caption([label]), pa.string()))


def caption_lists(columns: Sequence[tuple[CaptionAspect, pa.Array]]) -> pa.Array:
    """Caption columns as `captions`, in their order; null cells give none."""
    texts = zip(*(column.to_pylist() for _, column in columns), strict=True)
    aspects = [aspect for aspect, _ in columns]
    rows = [
        [{"aspect": aspect, "text": cell} for aspect, cell in zip(aspects, row, strict=True) if cell is not None]
        for row in texts
    ]
    return pa.array(rows, pa.list_(CAPTION))


def tree_columns(levels: Sequence[pa.Array]) -> tuple[pa.Array, pa.Array, Ontology]:
    """`(finest label, path, tree)` of diagnosis columns, coarse to fine; commas inside a name are left out.

    Raises:
        OntologyError: the columns contradict each other: a name is above another one and also below it.
    """

    def name(cell: str) -> str:
        return " ".join(cell.replace(",", " ").split())

    columns = [map_values(text(level), name, pa.string()).to_pylist() for level in levels]
    paths = [list(dict.fromkeys(filter(None, row))) for row in zip(*columns, strict=True)]
    labels = pa.array([path[-1] if path else None for path in paths], pa.string())
    hierarchy = pa.array([", ".join(path) or None for path in paths], pa.string())
    return labels, hierarchy, Ontology.from_paths(dict.fromkeys(map(tuple, paths)))


@dataclass(frozen=True)
class OfPatients:
    """What a table says of its patients, read by `dermray.corpus.patients`.

    Attributes:
        age: in years, float32 `[N]`.
        sex: `female`, `male`, `other`, string `[N]`.
        skin_type: Fitzpatrick type 1-6, int8 `[N]`.
        as_written: by field, the cells that the reading does not hold whole (not understood, or a range): for `extra`.
        not_understood: by field, how often each text stands that no reading fits.
    """

    age: pa.Array
    sex: pa.Array
    skin_type: pa.Array
    as_written: dict[str, pa.Array]
    not_understood: dict[str, dict[str, int]]


def of_patients(
    num_rows: int, *, age: pa.Array | None = None, sex: pa.Array | None = None, skin_type: pa.Array | None = None
) -> OfPatients:
    """Read columns of raw cells; placeholders ("unknown", "nan", -1, …) are null and no misunderstanding."""
    written = {"age": age, "sex": sex, "skin_type": skin_type}
    read: dict[str, pa.Array] = {}
    kept: dict[str, pa.Array] = {}
    not_understood: dict[str, dict[str, int]] = {}
    for name, (function, result_type) in PATIENT_FIELDS.items():
        cells = text(column) if (column := written[name]) is not None else pa.nulls(num_rows, pa.string())
        read[name] = map_values(cells, function, result_type)
        unread = pc.if_else(pc.is_null(read[name]), cells, pa.scalar(None, pa.string()))
        counted = pc.value_counts(unread.drop_null()).to_pylist()
        if counted:
            not_understood[name] = {each["values"]: each["counts"] for each in counted}
        ranges = map_values(cells, lambda cell: cell if patients.is_age_range(cell) else None, pa.string())
        whole = pc.coalesce(unread, ranges) if name == "age" else unread
        if whole.null_count < num_rows:
            kept[name] = whole
    return OfPatients(**read, as_written=kept, not_understood=not_understood)


def merged_counts(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Counts by field and text, summed."""
    merged: dict[str, Counter[str]] = defaultdict(Counter)
    for fields in counts:
        for name, values in fields.items():
            merged[name].update(values)
    return {name: dict(values) for name, values in merged.items()}


def first_of(*columns: pa.Array | None) -> pa.Array | None:
    """The first present value of each row."""
    present = [column for column in columns if column is not None]
    return pc.coalesce(*present) if present else None


def extras(columns: Mapping[str, pa.Array]) -> pa.Array | None:
    """Columns without a field of their own as one JSON object a row; null where all are empty."""
    if not columns:
        return None
    names = list(columns)
    rows = list(zip(*(columns[name].to_pylist() for name in names), strict=True))
    texts: dict[tuple[Any, ...], str | None] = {}
    for values in rows:
        if values not in texts:
            kept = {name: value for name, value in zip(names, values, strict=True) if value is not None}
            texts[values] = json.dumps(kept, ensure_ascii=False) if kept else None
    return pa.array([texts[values] for values in rows], pa.string())


def map_values(column: pa.Array, function: Callable[[str], Any], result_type: pa.DataType) -> pa.Array:
    """Apply a function to each distinct string once; null stays null."""
    encoded = column.dictionary_encode()
    values = pa.array([function(value) for value in encoded.dictionary.to_pylist()], result_type)
    return values.take(encoded.indices)


def leftover(table: pa.Table, used: Collection[str | None]) -> dict[str, pa.Array]:
    """Columns of a table that no field has used, cleaned."""
    return {name: text(table[name].combine_chunks()) for name in table.column_names if name not in used}
