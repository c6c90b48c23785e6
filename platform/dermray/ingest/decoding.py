"""What the tasks of the loader do: read row groups, and turn some of their rows into pixels and tokens.

Nothing here needs torch, so that a worker process is ready in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import cv2
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


def read(index: ShardIndex, groups: Sequence[int]) -> list[pa.Table]:
    """Row groups by their numbers in manifest order, fetched at the same time.

    Raises:
        CorpusError: a shard is shorter than its manifest says, damaged, or gone.
    """
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(lambda group: index.read_row_group(group, COLUMNS), groups))


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
        tables: Sequence[pa.Table],
        table_of: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
    ) -> Decoded:
        """Decode, crop, choose captions, tokenise.

        Args:
            epoch: of the run.
            samples: indices of n samples, which seed their random choices.
            tables: row groups that hold them.
            table_of: position in `tables` of each sample's row group.
            row_of: and its row there.

        Raises:
            CorpusError: an image is damaged.
        """
        # Ray shares the cores out; OpenCV would take them all for each task.
        cv2.setNumThreads(1)
        pixels = np.empty((len(samples), self.image_size, self.image_size, 3), dtype=np.uint8)
        texts = [""] * len(samples)
        for number, table in enumerate(tables):
            places = np.flatnonzero(table_of == number)
            rows = row_of[places]
            captions = table["captions"].take(pa.array(rows)).to_pylist()
            for place, row, own in zip(places, rows.tolist(), captions, strict=True):
                random = augment.generator(self.seed, epoch, int(samples[place]))
                pixels[place] = self._crop(table, row, random)
                texts[place] = augment.choose_caption(own, self.settings.captions, random)
        return pixels, self.encode_texts(texts)

    def _crop(self, table: pa.Table, row: int, random: np.random.Generator) -> npt.NDArray[np.uint8]:
        try:
            image = images.decode(table["image"][row].as_py())
        except ImageError as error:
            raise CorpusError(
                f"{self.corpus}: the image of sample {table['sample_id'][row]} is damaged ({error}); "
                "prepare the corpus again"
            ) from error
        return augment.crop_and_resize(
            image,
            random,
            size=self.image_size,
            scale=self.settings.crop_scale,
            horizontal_flip=self.settings.horizontal_flip,
        )
