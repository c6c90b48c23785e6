"""One small reader per published layout, and the registry of them.

A reader is a function `SourceRequest -> RawRows`. To add one: write a module, name its function here.
"""

from __future__ import annotations

from collections.abc import Callable

from dermray.prepare.sources import csv, derm1m, pad_ufes_20
from dermray.prepare.sources.rows import RawRows, SourceRequest

Reader = Callable[[SourceRequest], RawRows]

READERS: dict[str, Reader] = {
    "csv": csv.read,
    "derm1m": derm1m.read,
    "pad_ufes_20": pad_ufes_20.read,
}

__all__ = ["READERS", "RawRows", "Reader", "SourceRequest"]
