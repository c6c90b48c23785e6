"""What every answer tells beside what was asked: where the time went, and which image could not be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """One image that cannot be used: its position in the request, `ImageError`'s reason and message."""

    index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went: the longest of its items at each stage, and the batches its items rode in."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0
    classifier_s: float = 0.0
    batch_sizes: tuple[int, ...] = ()
