"""MAKE's training table: `MAKE_train.csv`, a table a split, with the columns of the released one, and images as files.

A row has one caption of each aspect and up to eight sub-captions, so a sample with more has several rows, each
sub-caption in that of its raw caption (`captions.parents`); the sentences over diagnosis and concepts are repeated in
them. `knowledge_masks` is [caption, ontology, visual], the order in which the published code
reads it. The reader of `source=make_table` is asked what it makes of every row: what of a sample does not come back is
counted, by field, since the released columns have no place for it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import pyarrow as pa

from dermray import storage
from dermray.corpus.captions import MAX_SUB_CAPTIONS, ONTOLOGY_TEMPLATE, diagnosis_path, named_in
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology, display_names
from dermray.corpus.schema import META, CaptionAspect
from dermray.export import image_files
from dermray.export.manifest import PartRecord
from dermray.export.parts import CAPTIONS, NOT_CARRIED, UNCAPTIONED, Part, Samples, publish_text
from dermray.export.settings import ExportConfig
from dermray.raw.sources.make_table import KNOWLEDGE, RELEASED, SUB_CAPTIONS, interpret
from dermray.raw.sources.rows import Findings
from dermray.raw.tables import StringTable

TABLE = "table"
# What the released table says where it says nothing.
NOTHING = {
    "standardized_disease": "no definitive diagnosis",
    "skin_concept_standarized": "No visual concepts",
    "body_location": "No body location information",
    "symptoms": "No symptom information",
    "age": "No age information",
    "gender": "No gender information",
}

Sample = Mapping[str, Any]
Cells = dict[str, str]


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """The folders of images of a split, and its table."""
    table = Part(TABLE, split, 0, 0, num_samples, (f"MAKE_{split}.csv",))
    return [*image_files.plan(split, num_samples, config), table]


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a folder of images or a table; the same bytes each time.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    if part.kind == image_files.IMAGES:
        return image_files.write(part, samples, config)
    (path,) = part.paths
    has_tree = storage.exists(storage.join(config.corpus, ONTOLOGY_NAME))
    tree = Ontology.load(config.corpus) if has_tree else None
    return publish_text(config.output, path, lambda sink: _write_table(sink, part, samples, config, tree))


def _write_table(
    sink: TextIO, part: Part, samples: Samples, config: ExportConfig, tree: Ontology | None
) -> dict[str, int]:
    assert part.split is not None
    # A lone carriage return in a cell without marks would end the row.
    writer = csv.DictWriter(sink, RELEASED, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    paths = image_files.paths(part.split, part.last, config)
    counts = Counter({CAPTIONS: 0, UNCAPTIONED: 0})
    wanted = [name for name in samples.columns.names if name != "image"]
    for table in samples.tables(part.split, part.first, part.last, wanted):
        group = table.to_pylist()
        known = tree or Ontology.flat(label for sample in group for label in sample["labels"])
        rows = [_rows(sample, next(paths), known) for sample in group]
        writer.writerows(row for each in rows for row in each)
        for sample, lost in zip(group, _not_carried(group, rows, known), strict=True):
            counts[CAPTIONS] += len(sample["captions"])
            counts[UNCAPTIONED] += not sample["captions"]
            counts.update(f"{NOT_CARRIED}{name}" for name in lost)
    return dict(sorted(counts.items()))


@dataclass
class _Captions:
    """The captions of a row; `repeated` are those of the row before it, for want of its own."""

    knowledge: dict[CaptionAspect, str] = field(default_factory=dict)
    subs: list[str] = field(default_factory=list)
    repeated: set[CaptionAspect] = field(default_factory=set)

    def has_place(self, aspect: CaptionAspect) -> bool:
        """Whether one more caption can stand in this row, a raw one only before its sub-captions."""
        if aspect == "sub":
            return len(self.subs) < MAX_SUB_CAPTIONS
        return (aspect not in self.knowledge or aspect in self.repeated) and not (aspect == "raw" and self.subs)

    def take(self, aspect: CaptionAspect, text: str) -> None:
        """Give it its place."""
        if aspect == "sub":
            self.subs.append(text)
        else:
            self.knowledge[aspect] = text
            self.repeated.discard(aspect)

    def next_row(self) -> _Captions:
        """A row for what has no place here: equal sentences are one caption when they are read."""
        sentences = dict(self.knowledge)
        sentences.pop("raw", None)
        return _Captions(sentences, repeated=set(sentences))


def _laid_out(captions: Sequence[Mapping[str, Any]]) -> list[_Captions]:
    rows = [_Captions()]
    for caption in captions:
        if not rows[-1].has_place(caption["aspect"]):
            rows.append(rows[-1].next_row())
        rows[-1].take(caption["aspect"], caption["text"])
    return rows


def _rows(sample: Sample, path: str, tree: Ontology) -> list[Cells]:
    """The rows of a sample, every released column of each."""
    shared = {"filename": path, **_facts(sample), **_diagnosis(sample["labels"], tree)}
    shared["skin_concept_standarized"] = _listed(sample["concepts"])
    rows = []
    for captions in _laid_out(sample["captions"]):
        texts = [captions.knowledge.get(aspect, "") for aspect, _ in KNOWLEDGE]
        raw, ontology, _ = texts
        blank = MAX_SUB_CAPTIONS - len(captions.subs)
        row = {
            **shared,
            "caption": raw,
            "ontology_final": named_in(ONTOLOGY_TEMPLATE, ontology) or shared["ontology_final"],
            "augmented_caption": "".join(texts),
            **{name: text for (_, name), text in zip(KNOWLEDGE, texts, strict=True)},
            "sub_captions": str(len(captions.subs)),
            **dict(zip(SUB_CAPTIONS, [*captions.subs, *[""] * blank], strict=True)),
            "sub_caption_mask": str([1] * len(captions.subs) + [0] * blank),
            "knowledge_masks": str([int(bool(text)) for text in texts]),
        }
        # No table of text with a NUL can be read; what stands in its place is counted as not carried.
        rows.append({name: (row[name] or NOTHING.get(name, "")).replace("\0", "\ufffd") for name in RELEASED})
    return rows


def _facts(sample: Sample) -> Cells:
    said = sample["meta"] or {}
    extra = _object(said.get("extra"))
    age = said.get("age")
    return {
        "source": str(extra.get("source") or sample["source"]),
        "source_type": str(extra.get("source_type") or ""),
        "body_location": said.get("body_site") or "",
        "symptoms": said.get("symptoms") or "",
        # A range, or what was not understood, stands there as it was written.
        "age": str(extra.get("age") or ("" if age is None else f"{age:g}")),
        "gender": str(extra.get("sex") or said.get("sex") or ""),
    }


def _diagnosis(labels: Sequence[str], tree: Ontology) -> Cells:
    if not labels:
        return {"standardized_disease": "", "ontology_final": ""}
    plain = ", ".join(display_names(labels))
    cell = plain if tree.resolve_all(plain).labels == tuple(labels) else str(list(labels))
    return {"standardized_disease": cell, "ontology_final": ", ".join(diagnosis_path(labels, tree))}


def _listed(concepts: Sequence[str]) -> str:
    return str(list(concepts)) if any("," in concept for concept in concepts) else ", ".join(concepts)


def _object(text: str | None) -> dict[str, Any]:
    """The object of `meta.extra`; an empty one where it holds none."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _not_carried(group: Sequence[Sample], rows: Sequence[Sequence[Cells]], tree: Ontology) -> Iterator[list[str]]:
    """What of each sample the reader does not give back, by field."""
    cells = [row for each in rows for row in each]
    table = pa.table({name: pa.array([row[name] for row in cells], pa.string()) for name in RELEASED})
    read = interpret(StringTable("the export", table, pa.array(range(1, len(cells) + 1)), ()), Findings()).table
    back = iter(read.to_pylist())
    for sample, each in zip(group, rows, strict=True):
        yield list(_differing(sample, [next(back) for _ in each], tree))


def _differing(sample: Sample, read: Sequence[Sample], tree: Ontology) -> Iterator[str]:
    first = read[0]
    captions = [caption for row in read for caption in row["captions"]]
    distinct = [each for place, each in enumerate(captions) if each not in captions[:place]]
    num_subs = sum(caption["aspect"] == "sub" for caption in distinct)
    if _sorted(distinct) != _sorted(sample["captions"]) or num_subs > MAX_SUB_CAPTIONS:
        yield "captions"
    elif distinct != sample["captions"]:
        yield "order of captions"
    if any(
        row[said] and aspect not in {caption["aspect"] for caption in row["captions"]}
        for row in read
        for said, aspect in (("labels", "ontology"), ("concepts", "concept"))
    ):
        # Preparation puts a row's diagnosis and concepts into words where the row does not.
        yield "absence of a sentence"
    labels = tree.most_specific(label for text in first["labels"] for label in tree.resolve_all(text).labels)
    if labels != list(sample["labels"]):
        yield "labels"
    for name in ("concepts", "source", "source_id", "skin_type", "modality"):
        if sample.get(name) is not None and first[name] != sample[name]:
            yield name
    said, again = sample["meta"] or {}, first["meta"]
    for name in META.names:
        if said.get(name) not in (None, again[name]):
            # Among others of the row's.
            kept = _object(said[name]) if name == "extra" else {}
            if not kept or not kept.items() <= _object(again["extra"]).items():
                yield f"meta.{name}"


def _sorted(captions: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    return sorted((caption["aspect"], caption["text"]) for caption in captions)
