"""A sample as masked latent alignment sees it: one crop, at the teacher's size too, and which patches are hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dermray import images
from dermray.errors import ImageError
from dermray.ingest import augment, patch_masks
from dermray.ingest.settings import DataConfig
from dermray.ingest.views import Arrays, ArraySpec, Item

PIXELS, TEACHER_PIXELS, MASK, KEPT = "pixels", "teacher_pixels", "mask", "kept"


@dataclass(frozen=True)
class MaskedImage:
    """What is made of a sample; all of it is drawn by (seed, epoch, sample), so that no worker matters.

    `pixels` uint8 `[n, S, S, 3]`, RGB, cropped and mirrored; `teacher_pixels` uint8 `[n, T, T, 3]`, the same crop by
    another filter, where the teacher has a size of its own; `mask` bool `[n, grid²]`; `kept` float32 `[n, branches]`,
    what residual branches are multiplied with, where drop path leaves some out.

    Attributes:
        settings: of crops.
        image_size: side S in pixels.
        teacher_size: side T in pixels; None: the teacher sees what the encoder does.
        mask: how patches are chosen.
        grid: patches on a side.
        num_masked: of each image.
        drop_rates: how likely each residual branch is left out; empty: never.
    """

    settings: DataConfig
    image_size: int
    teacher_size: int | None
    mask: patch_masks.MaskKind
    grid: int
    num_masked: int
    drop_rates: tuple[float, ...] = ()
    columns = ("image",)

    def specs(self, step: int) -> Mapping[str, ArraySpec]:
        """The same at every step."""
        specs = {
            PIXELS: ArraySpec("uint8", (self.image_size, self.image_size, 3)),
            MASK: ArraySpec("bool", (self.grid**2,)),
        }
        if self.teacher_size is not None:
            specs[TEACHER_PIXELS] = ArraySpec("uint8", (self.teacher_size, self.teacher_size, 3))
        if self.drop_rates:
            specs[KEPT] = ArraySpec("float32", (len(self.drop_rates),))
        return specs

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        """Decode, crop to one size or two, hide patches, leave branches out.

        Raises:
            CorpusError: an image is damaged.
        """
        images.use_one_core()
        filters = {PIXELS: augment.BICUBIC, TEACHER_PIXELS: augment.LANCZOS}
        for place, item in enumerate(items):
            (row,) = item.rows
            crops = [augment.Crop(out[name][place], by) for name, by in filters.items() if name in out]
            try:
                augment.crop_to_sizes(
                    images.decode(row["image"]),
                    item.random,
                    crops,
                    scale=self.settings.crop_scale,
                    horizontal_flip=self.settings.horizontal_flip,
                )
            except ImageError as error:
                raise row.damaged(error) from error
        randoms = [item.random for item in items]
        out[MASK][:] = patch_masks.masks(self.mask, randoms, self.grid, self.num_masked)
        if self.drop_rates:
            out[KEPT][:] = kept(randoms, self.drop_rates)


def kept(randoms: Sequence[np.random.Generator], rates: Sequence[float]) -> np.ndarray:
    """0 for a residual branch left out of an image, else 1 over the share of images that have it: `[n, branches]`."""
    leave = np.array(rates)
    draws = np.stack([random.random(len(leave)) for random in randoms])
    return np.where(draws < leave, 0, 1 / (1 - leave)).astype(np.float32)
