"""Text classifiers, built once per (model, class list, templates), and the ranking of one image by them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

ClassifierKey = tuple[str, tuple[str, ...], tuple[str, ...]]


class ClassifierCache:
    """The most recently used text classifiers of the loaded models. Thread-safe; never blocks its caller.

    A classifier that many requests ask for at once is built once. A failed build is forgotten, so that the next
    request tries again.
    """

    def __init__(self, executor: Executor, *, capacity: int = 64) -> None:
        """Build on `executor`; keep at most `capacity` classifiers."""
        self._executor = executor
        self._capacity = capacity
        self._entries: OrderedDict[ClassifierKey, Future[np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def submit(
        self,
        model_digest: str,
        class_names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[], np.ndarray],
    ) -> Future[np.ndarray]:
        """The weights float32 `[C, D]` of a class list: already there, being built, or now to be built by `build()`.

        The future is shared by everybody who asked for the same key, so do not cancel it.
        """
        key = (model_digest, tuple(class_names), tuple(templates))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
            entry = self._entries[key] = self._executor.submit(build)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        # Outside the lock: a build that has already ended calls back at once, in this thread.
        entry.add_done_callback(lambda done: self._forget_failure(key, done))
        return entry

    def _forget_failure(self, key: ClassifierKey, done: Future[np.ndarray]) -> None:
        if done.cancelled() or done.exception() is not None:
            with self._lock:
                if self._entries.get(key) is done:
                    del self._entries[key]


@dataclass(frozen=True, slots=True)
class RankedClass:
    """One candidate of a ranking; probabilities of a ranking sum to 1."""

    label: str
    probability: float
    logit: float


def rank(
    image_feature: np.ndarray, weights: np.ndarray, class_names: Sequence[str], logit_scale: float
) -> list[RankedClass]:
    """Rank classes for one image, most probable first; equal logits keep the order of the list.

    Args:
        image_feature: float32 `[D]`, L2-normalised.
        weights: float32 `[C, D]`, L2-normalised rows.
        class_names: C names.
        logit_scale: exponentiated scale; logits are `logit_scale * cosine`, probabilities their softmax.
    """
    logits = float(logit_scale) * (weights.astype(np.float64) @ image_feature.astype(np.float64))
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")
    return [RankedClass(class_names[i], float(probabilities[i]), float(logits[i])) for i in order]
