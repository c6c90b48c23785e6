"""Pieces of a table done in this process, the last one first: what tasks elsewhere may come to."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from ray import cloudpickle

from dermray.raw.sources import tables


def backwards(pieces: Mapping[str, Any], work: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Results as they come back from another process; more than one piece there must be."""
    for name in reversed(pieces):
        done = pickle.loads(cloudpickle.dumps(work))(pickle.loads(cloudpickle.dumps(pieces[name])))
        yield name, pickle.loads(cloudpickle.dumps(done))


def in_small_pieces(monkeypatch: pytest.MonkeyPatch, num_bytes: int = 512, num_rows: int = 20) -> None:
    """Have tasks read every table of text or Parquet, in pieces of a few rows."""
    monkeypatch.setattr(tables, "TASKS_FROM_BYTES", 0)
    monkeypatch.setattr(tables, "PIECE_BYTES", num_bytes)
    monkeypatch.setattr(tables, "PIECE_ROWS", num_rows)
