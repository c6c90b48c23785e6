"""Writing a shard again: rows of shards that are there, merged, marked and brought together as decided."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dermray import storage
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import WHOLE
from dermray.corpus.shards import read_row_group
from dermray.prepare.reconcile import Amendment, Ref
from dermray.prepare.records import ShardRecord, write_record
from dermray.prepare.samples import Counts, count_copies, count_sample, merge_samples
from dermray.prepare.shard import IMAGE_COLUMN, schema_of, sorted_counts, write_shard

WITHOUT_IMAGE = [name for name in WHOLE.names if name != IMAGE_COLUMN]


@dataclass(frozen=True)
class Amender:
    """Writes amended shards of one corpus; knows nothing of Ray, and travels to where the work is done."""

    output: str
    row_group_size: int
    ontology: Ontology
    with_modality: bool = False

    def make(self, amendment: Amendment) -> ShardRecord:
        """Write the shard and its record.

        Raises:
            CorpusError: a shard that it reads is gone or damaged.
            StorageError: the output fails for good.
        """
        rows = self._read((output.ref for output in amendment.outputs), WHOLE.names)
        merged = self._read((ref for output in amendment.outputs for ref in output.merged), WITHOUT_IMAGE)
        samples = []
        counts: Counts = defaultdict(Counter)
        for output in amendment.outputs:
            equal = [rows[output.ref], *(merged[ref] for ref in output.merged)]
            sample = merge_samples(equal)
            count_copies(counts, equal, self.ontology)
            sample["split"] = amendment.split
            sample["duplicate_group"] = output.duplicate_group
            count_sample(counts, sample)
            samples.append(sample)
        schema = schema_of(samples, with_modality=self.with_modality)
        record = ShardRecord(
            key=amendment.key,
            shard=write_shard(self.output, amendment.name, amendment.split, samples, self.row_group_size, schema),
            num_rows=0,
            inputs="",
            dropped=(),
            dropped_images=(),
            row_counts={},
            sample_counts=sorted_counts(counts),
            notes=amendment.notes,
        )
        write_record(self.output, record)
        return record

    def _read(self, refs: Iterable[Ref], columns: list[str]) -> Mapping[Ref, dict[str, Any]]:
        """The rows of `refs`; each row group is read once."""
        wanted: dict[tuple[str, int], list[Ref]] = defaultdict(list)
        for ref in refs:
            wanted[ref.shard, ref.position // self.row_group_size].append(ref)
        found: dict[Ref, dict[str, Any]] = {}
        for (shard, group), members in wanted.items():
            table = read_row_group(storage.inside(self.output, shard), group, columns)
            places = [ref.position - group * self.row_group_size for ref in members]
            found.update(zip(members, table.take(places).to_pylist(), strict=True))
        return found
