"""What the tasks of the loader do: read row groups, and turn some of their rows into the arrays of a `Views`.

Nothing here needs torch, so that a worker process is ready in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dermray.corpus.side_tables import RowGroupReader
from dermray.ingest import augment
from dermray.ingest.corpora import read_from
from dermray.ingest.views import Arrays, Item, Row, Views

# Of every row, for messages.
NAMED_BY = "sample_id"


def read(index: RowGroupReader, groups: Sequence[int], columns: Sequence[str]) -> list[pa.Buffer]:
    """Row groups by their numbers in manifest order, fetched at the same time and packed for `unpacked`.

    Raises:
        CorpusError: a shard is shorter than its manifest says, damaged, or gone.
    """
    wanted = list(dict.fromkeys([*columns, NAMED_BY]))
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(lambda group: _packed(index.read_row_group(group, wanted)), groups))


def _packed(table: pa.Table) -> pa.Buffer:
    """One stretch of bytes in Arrow's stream format: Ray takes five times as long to hand over a table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])
    return sink.getvalue()


def unpacked(row_group: pa.Buffer) -> pa.RecordBatch:
    """The rows of a row group that `read` has packed; their content stays where it is."""
    return pa.ipc.open_stream(row_group).read_next_batch()


@dataclass(frozen=True)
class Decoder:
    """Rows of row groups → the arrays that an objective wants.

    Attributes:
        corpus: its URI, for messages; row groups of several corpora say themselves where they are from.
        seed: of the run.
        views: makes the arrays.
    """

    corpus: str
    seed: int
    views: Views

    def __call__(
        self,
        step: int,
        epoch: int,
        draws: npt.NDArray[np.int64],
        row_groups: Sequence[pa.RecordBatch],
        group_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        *,
        lengths: npt.NDArray[np.int64] | None = None,
        out: Arrays | None = None,
    ) -> Arrays:
        """Make the arrays of n draws.

        Args:
            step: of the run, which may decide shapes.
            epoch: of the run.
            draws: of the epoch's plan, which seed the random choices.
            row_groups: those that hold their samples.
            group_of: position in `row_groups` of each draw's row group.
            row_of: and its row there, the first of its item.
            lengths: rows of each draw's item, which follow each other; None: one each.
            out: contiguous arrays as declared, which are new memory otherwise.

        Raises:
            CorpusError: a row holds what cannot be used, such as a damaged image.
        """
        arrays = self.empty(step, len(draws)) if out is None else out
        columns = [dict(zip(group.schema.names, group.columns, strict=True)) for group in row_groups]
        corpora = [read_from(group.schema.metadata) or self.corpus for group in row_groups]
        ends = row_of + (1 if lengths is None else lengths)
        items = [
            Item(
                tuple(Row(columns[number], row, corpora[number]) for row in range(first, end)),
                augment.generator(self.seed, epoch, draw),
            )
            for number, first, end, draw in zip(
                group_of.tolist(), row_of.tolist(), ends.tolist(), draws.tolist(), strict=True
            )
        ]
        self.views.make(items, arrays)
        return arrays

    def empty(self, step: int, num_samples: int) -> Arrays:
        """New memory for the arrays of so many samples of a step."""
        return {name: spec.empty(num_samples) for name, spec in self.views.specs(step).items()}
