"""A sample as contrastive learning sees it: one crop of its image and one of its captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dermray import images
from dermray.errors import ImageError
from dermray.ingest import augment
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import TextEncoder
from dermray.ingest.views import Arrays, ArraySpec, Item
from dermray.train.objectives.contrastive.diagnoses import DIAGNOSIS, diagnosis_of

PIXELS, TOKENS = "pixels", "tokens"


@dataclass(frozen=True)
class ImageAndCaption:
    """`pixels` uint8 `[n, S, S, 3]`, RGB, cropped and mirrored; `tokens` int32 `[n, L]` of a caption.

    Attributes:
        settings: crops and captions.
        image_size: side S of the square images, in pixels.
        encode_texts: makes tokens of captions.
        diagnoses: number of each label that counts; then there is `diagnosis` int64 `[n]` too, -1 without one.
    """

    settings: DataConfig
    image_size: int
    encode_texts: TextEncoder
    diagnoses: Mapping[str, int] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels only where they count."""
        return ("image", "captions") if self.diagnoses is None else ("image", "captions", "labels")

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        context_length = self.encode_texts([""]).shape[1]
        return {
            PIXELS: ArraySpec("uint8", (self.image_size, self.image_size, 3)),
            TOKENS: ArraySpec("int32", (context_length,)),
            **({} if self.diagnoses is None else {DIAGNOSIS: ArraySpec("int64", ())}),
        }

    def specs(self, step: int) -> Mapping[str, ArraySpec]:
        """The same at every step."""
        return self._specs

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        """Decode, crop, choose captions, tokenise.

        Raises:
            CorpusError: an image is damaged.
        """
        images.use_one_core()
        pixels, texts = out[PIXELS], []
        for place, item in enumerate(items):
            (row,) = item.rows
            write_crop(item, self.settings, pixels[place])
            texts.append(augment.choose_caption(row["captions"], self.settings.captions, item.random))
            if self.diagnoses is not None:
                out[DIAGNOSIS][place] = diagnosis_of(row, self.diagnoses)
        out[TOKENS][:] = self.encode_texts(texts)


def write_crop(item: Item, settings: DataConfig, out: npt.NDArray[np.uint8]) -> None:
    """A random crop of an item's one image.

    Args:
        item: what is drawn from and decoded.
        settings: of crops.
        out: contiguous uint8 `[S, S, 3]`.

    Raises:
        CorpusError: the image is damaged.
    """
    (row,) = item.rows
    try:
        augment.crop_and_resize(
            images.decode(row["image"]),
            item.random,
            size=len(out),
            scale=settings.crop_scale,
            horizontal_flip=settings.horizontal_flip,
            out=out,
        )
    except ImageError as error:
        raise row.damaged(error) from error
