"""How long a preparation takes, and that it says so meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from dermray.progress import busy


@dataclass
class Timing:
    """How long what took.

    Attributes:
        stages: seconds of each stage by the clock on the wall.
        tasks: seconds of each kind of work, summed over all pieces.
        ray_data: what Ray Data says of each dataset that it ran (`Dataset.stats`).
    """

    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tasks: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ray_data: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, *, tells: bool = False) -> Iterator[None]:
        """Around a stage; one that `tells` says itself how far it is."""
        started = time.monotonic()
        with nullcontext() if tells else busy(f"prepare: {name}"):
            yield
        self.stages[name] += time.monotonic() - started

    def to_json(self) -> dict[str, Any]:
        """All of it, seconds rounded to milliseconds."""
        parts = {"stages": self.stages, "tasks": self.tasks}
        seconds = {part: {name: round(value, 3) for name, value in of.items()} for part, of in parts.items()}
        return {**seconds, "ray_data": self.ray_data}
