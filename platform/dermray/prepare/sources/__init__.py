"""One small reader per published layout, and the registry of them.

A reader is a function `SourceRequest -> RawRows`. To add one: write a module, name its function here.
"""

from __future__ import annotations

from collections.abc import Callable

from dermray.prepare.sources import (
    csv,
    derm1m,
    derm7pt,
    fitzpatrick17k,
    ham10000,
    image_folder,
    isic,
    make_table,
    pad_ufes_20,
    parquet,
    skincap,
    skincon,
    webdataset,
)
from dermray.prepare.sources.rows import RawRows, SourceRequest

Reader = Callable[[SourceRequest], RawRows]

READERS: dict[str, Reader] = {
    "csv": csv.read,
    "derm1m": derm1m.read,
    "derm7pt": derm7pt.read,
    "fitzpatrick17k": fitzpatrick17k.read,
    "ham10000": ham10000.read,
    "image_folder": image_folder.read,
    "isic": isic.read,
    "make_table": make_table.read,
    "pad_ufes_20": pad_ufes_20.read,
    "parquet": parquet.read,
    "skincap": skincap.read,
    "skincon": skincon.read,
    "webdataset": webdataset.read,
}

__all__ = ["READERS", "RawRows", "Reader", "SourceRequest"]
