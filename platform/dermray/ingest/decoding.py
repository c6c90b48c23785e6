"""What the tasks of the loader do: read row groups, and turn some of their rows into pixels and tokens.

Nothing here needs torch, so that a worker process is ready in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dermray import images
from dermray.corpus.shards import ShardIndex
from dermray.errors import CorpusError, ImageError
from dermray.ingest import augment
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import TextEncoder

COLUMNS = ("image", "captions", "sample_id")
# Pixels uint8 `[n, S, S, 3]`, tokens int32 `[n, L]`.
Decoded: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]


def read(index: ShardIndex, groups: Sequence[int]) -> list[pa.Buffer]:
    """Row groups by their numbers in manifest order, fetched at the same time and packed for `unpacked`.

    Raises:
        CorpusError: a shard is shorter than its manifest says, damaged, or gone.
    """
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(lambda group: _packed(index.read_row_group(group, COLUMNS)), groups))


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
    """Rows of row groups → pixels and tokens.

    Attributes:
        corpus: its URI, for messages.
        settings: crops and captions.
        image_size: side S of the square images, in pixels.
        seed: of the run.
        encode_texts: makes tokens of captions.
    """

    corpus: str
    settings: DataConfig
    image_size: int
    seed: int
    encode_texts: TextEncoder

    def __call__(
        self,
        epoch: int,
        samples: npt.NDArray[np.int64],
        row_groups: Sequence[pa.RecordBatch],
        group_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        *,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> Decoded:
        """Decode, crop, choose captions, tokenise.

        Args:
            epoch: of the run.
            samples: indices of n samples, which seed their random choices.
            row_groups: those that hold them.
            group_of: position in `row_groups` of each sample's row group.
            row_of: and its row there.
            out: contiguous uint8 `[n, S, S, 3]` that takes the pixels, which are new memory otherwise.

        Raises:
            CorpusError: an image is damaged.
        """
        images.use_one_core()
        pixels = np.empty(self.shape(len(samples)), dtype=np.uint8) if out is None else out
        texts = [""] * len(samples)
        columns = [(group.column("image"), group.column("captions")) for group in row_groups]
        for place, (number, row) in enumerate(zip(group_of.tolist(), row_of.tolist(), strict=True)):
            encoded, captions = columns[number]
            random = augment.generator(self.seed, epoch, int(samples[place]))
            try:
                image = images.decode(encoded[row].as_py())
            except ImageError as error:
                raise self._damaged(row_groups[number], row, error) from error
            augment.crop_and_resize(
                image,
                random,
                size=self.image_size,
                scale=self.settings.crop_scale,
                horizontal_flip=self.settings.horizontal_flip,
                out=pixels[place],
            )
            texts[place] = augment.choose_caption(captions[row].as_py(), self.settings.captions, random)
        return pixels, self.encode_texts(texts)

    def shape(self, num_samples: int) -> tuple[int, int, int, int]:
        """Of the pixels of so many samples."""
        return num_samples, self.image_size, self.image_size, 3

    def _damaged(self, row_group: pa.RecordBatch, row: int, error: ImageError) -> CorpusError:
        return CorpusError(
            f"{self.corpus}: the image of sample {row_group.column('sample_id')[row]} is damaged ({error}); "
            "prepare the corpus again"
        )
