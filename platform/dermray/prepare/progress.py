"""One line every few seconds while shards are made: shards, images, images per second, time left."""

from __future__ import annotations

import threading
import time
from types import TracebackType

FIRST_INTERVAL_S = 2.0
LAST_INTERVAL_S = 60.0


class Progress:
    """Prints from a thread of its own how much of what is told by `add` is done."""

    def __init__(self, *, num_shards: int, num_images: int) -> None:
        self.num_shards = num_shards
        self.num_images = num_images
        self.shards_done = 0
        self.images_done = 0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prepare-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def add(self, num_images: int) -> None:
        """One more shard is done, of so many images."""
        self.shards_done += 1
        self.images_done += num_images

    def _run(self) -> None:
        # Long runs are told less often: thirty lines, then one a minute.
        while not self._over.wait(min(LAST_INTERVAL_S, max(FIRST_INTERVAL_S, self._elapsed() / 30))):
            print(self.line(self._elapsed()), flush=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def line(self, elapsed_s: float) -> str:
        """The progress line at a moment."""
        rate = self.images_done / elapsed_s if elapsed_s > 0 else 0.0
        left = f"{(self.num_images - self.images_done) / rate:,.0f} s left" if rate else "waiting for the first images"
        return (
            f"prepare: {self.shards_done}/{self.num_shards} shards, {self.images_done:,}/{self.num_images:,} images, "
            f"{rate:,.0f} images/s, {left}"
        )
