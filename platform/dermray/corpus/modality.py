"""What kind of picture an image is, as tables write it: one reading for every job.

Nothing is guessed: a text that this table does not hold is None, callers keep it as it was written and count it.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Modality = Literal["clinical", "dermoscopic", "total-body", "pathology", "confocal"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
# Those taken with an ordinary camera, of which one is no wrong name for the other: a tile of a body is a photograph.
PHOTOGRAPHS: frozenset[str] = frozenset({"clinical", "total-body"})

# Words and signs as `_plain` leaves them. `TBP tile: close-up`, `RCM: mosaic` and their like are the ISIC archive's;
# its `RCM: macroscopic` is a photograph by the confocal microscope's own camera, and neither one nor the other here.
_SAID: dict[str, Modality] = {
    **dict.fromkeys(
        (
            *("clinical", "clinical image", "clinical photo", "clinical photograph", "clinical close up"),
            *("clinical overview", "macroscopic", "macroscopic image", "close up", "photograph"),
            *("smartphone", "smartphone photo", "smartphone photograph"),
        ),
        "clinical",
    ),
    **dict.fromkeys(
        (
            *("dermoscopic", "dermoscopic image", "dermoscopy", "dermoscopy image", "dermatoscopic"),
            *("dermatoscopic image", "dermatoscopy", "epiluminescence microscopy"),
        ),
        "dermoscopic",
    ),
    **dict.fromkeys(
        (
            *("total body", "total body photograph", "total body photography", "total body tile", "tbp", "tbp tile"),
            *("tbp tile close up", "tbp tile overview", "3d total body photography", "3d tbp"),
        ),
        "total-body",
    ),
    **dict.fromkeys(
        (
            *("pathology", "pathology image", "dermatopathology", "histopathology", "histopathological", "histology"),
            *("histological", "whole slide", "whole slide image", "wsi"),
        ),
        "pathology",
    ),
    **dict.fromkeys(
        (*("confocal", "confocal microscopy", "reflectance confocal microscopy", "rcm", "rcm tile", "rcm mosaic"),),
        "confocal",
    ),
}
_GAPS = re.compile(r"[\s:_\u2010\u2011\u2013/-]+")


def modality(cell: str) -> Modality | None:
    """The kind of picture that a cell names: `Dermoscopy`, `TBP tile: close-up`, `total_body`; else None."""
    return _SAID.get(_GAPS.sub(" ", cell).strip().lower())
