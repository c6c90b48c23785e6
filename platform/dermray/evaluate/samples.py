"""The samples that are scored: everything about them but their pixels, in the order of their manifest or table.

Images are read where they are encoded (`dermray.vectors.embedding`); the few that a report shows are read one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dermray import storage
from dermray.corpus import branches
from dermray.corpus.accounts import OTHER_SPLIT, require_balance
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import MODALITY
from dermray.evaluate.statistics import groups
from dermray.vectors.embedding.units import Images, RowGroup, read_file, read_row_group, row_groups

RAW_ASPECT = "raw"
BEYOND = "beyond max_samples"
_COLUMNS = ["sample_id", "captions", "labels", "concepts", "skin_type", "source", "meta", MODALITY.name]


@dataclass(frozen=True)
class Samples:
    """The samples of one split, in manifest or table order. All lists have one entry a sample."""

    uri: str
    split: str
    # digest of the whole corpus or table, not of the split
    corpus_digest: str
    images: tuple[Images, ...]
    ids: list[str]
    # the raw caption, None where there is none
    captions: list[str | None]
    # ontology nodes, or what a raw table says; may be empty
    labels: list[list[str]]
    # concepts marked as present; may be empty
    concepts: list[list[str]]
    ontology: Ontology
    # the classes to choose from, in their order; empty: those that occur
    class_names: tuple[str, ...] = ()
    # the concepts that were looked for; empty: those that occur
    concept_names: tuple[str, ...] = ()
    # dimension → group of each sample, None where not known (`dermray.evaluate.statistics.groups`)
    groups: groups.Groups = field(default_factory=dict)
    # the texts of all captions; empty where only the raw ones are known
    texts: list[tuple[str, ...]] = field(default_factory=list)
    # rows of a raw table left out, by reason
    dropped: dict[str, int] = field(default_factory=dict)
    # what label cells hold that only stand for nothing ("nan", "unknown"), and how often
    placeholders: dict[str, int] = field(default_factory=dict)
    # what became of all rows of the table, or samples of the corpus: the figures of `require_balance`
    rows: dict[str, Any] = field(default_factory=dict)
    # what a raw table says and nobody understands: field → text → rows (`dermray.evaluate.telling`)
    told: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, uri: str, split: str, *, max_samples: int | None = None) -> Samples:
        """Read captions, labels and concepts of a split of the prepared corpus at `uri`.

        Raises:
            CorpusError: no corpus, no such split (the message lists those there are), or a damaged shard.
        """
        uri = storage.normalise(uri)
        manifest = Manifest.load(uri)
        images = tuple(row_groups(uri, manifest.select(split), max_samples))
        rows: list[dict[str, Any]] = []
        for group in images:
            rows.extend(read_row_group(group, _COLUMNS).to_pylist())
        labels = [list(row["labels"]) for row in rows]
        in_split = manifest.splits[split]
        asked = min(in_split, max_samples or in_split)
        not_asked = {OTHER_SPLIT: manifest.num_samples - in_split, BEYOND: in_split - asked}
        known = manifest.ontology_sha256 is not None
        return cls(
            uri=uri,
            split=split,
            corpus_digest=manifest.digest,
            images=images,
            ids=[row["sample_id"] for row in rows],
            captions=[_raw_caption(row["captions"]) for row in rows],
            labels=labels,
            concepts=[list(row["concepts"]) for row in rows],
            texts=[tuple(caption["text"] for caption in row["captions"]) for row in rows],
            groups=groups.of_corpus(rows),
            rows=require_balance(uri, manifest.num_samples, len(rows), not_asked),
            ontology=branches.load(uri) if known else Ontology.flat({one for each in labels for one in each}),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, other: Samples) -> Samples:
        """These samples and then the other ones, which are of the same data: what is encoded in one go. No groups."""
        moved = [replace(each, position=each.position + len(self)) for each in other.images]
        return replace(
            self,
            images=(*self.images, *moved),
            ids=self.ids + other.ids,
            captions=self.captions + other.captions,
            labels=self.labels + other.labels,
            concepts=self.concepts + other.concepts,
            texts=self.all_texts() + other.all_texts(),
            groups={},
        )

    def all_texts(self) -> list[tuple[str, ...]]:
        """What all captions of each sample say, as far as it is known."""
        return self.texts or [(caption,) if caption else () for caption in self.captions]

    def read_images(self, indices: list[int]) -> dict[int, bytes]:
        """Encoded images of a few samples, by their index; files that are not there are left out."""
        starts = np.array([each.position for each in self.images])
        wanted: dict[int, list[int]] = {}
        for index in sorted(set(indices)):
            wanted.setdefault(int(np.searchsorted(starts, index, "right")) - 1, []).append(index)
        found: dict[int, bytes] = {}
        for number, members in wanted.items():
            unit = self.images[number]
            if isinstance(unit, RowGroup):
                column = read_row_group(unit, ["image"]).column("image")
                found.update({index: column[index - unit.position].as_py() for index in members})
            else:
                read = {index: read_file(unit.uris[index - unit.position]) for index in members}
                found.update({index: data for index, data in read.items() if data is not None})
        return found


def _raw_caption(captions: list[dict[str, str]]) -> str | None:
    return next((each["text"] for each in captions if each["aspect"] == RAW_ASPECT and each["text"].strip()), None)
