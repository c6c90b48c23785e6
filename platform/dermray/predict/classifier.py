"""Text classifiers, built once per (model, class list, templates), and the ranking of one image by them."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy as np

from dermray.errors import DermRayError

ClassifierKey = tuple[str, tuple[str, ...], tuple[str, ...]]
# A prompt costs as much as so many characters; a longer one costs more.
PROMPT_CHARS = 256
# What is computed before the next classifier has its turn, in prompts.
TURN_PROMPTS = 64


class TooManyBuildsError(DermRayError):
    """So many classifiers are under construction that no further one is begun."""


def num_prompts(class_names: Sequence[str], templates: Sequence[str]) -> int:
    """What a classifier costs: one for each class and template, and for every `PROMPT_CHARS` characters of it."""
    lengths = [len(template) for template in templates]
    return sum(-(-(len(name) + length) // PROMPT_CHARS) or 1 for name in class_names for length in lengths)


@dataclass(slots=True)
class _Build:
    """A classifier that is done, under construction, or left half-way because nobody waits for it any more."""

    key: ClassifierKey
    build: Callable[[Sequence[str]], np.ndarray]
    future: Future[np.ndarray] = field(default_factory=Future)
    rows: list[np.ndarray] = field(default_factory=list)
    num_built: int = 0
    num_asking: int = 0
    is_going: bool = False

    def step(self) -> bool:
        """Build the rows of a turn; True when they were the last."""
        _, names, templates = self.key
        stop, cost = self.num_built, 0
        while stop < len(names):
            cost += num_prompts(names[stop : stop + 1], templates)
            if cost > TURN_PROMPTS and stop > self.num_built:
                break
            stop += 1
        self.rows.append(self.build(names[self.num_built : stop]))
        self.num_built = stop
        return stop >= len(names)


class ClassifierCache:
    """The most recently used text classifiers of the loaded models. Thread-safe; never blocks its caller.

    A classifier that many requests ask for at once is built once. Those under construction take turns of a few rows, so
    that a short list does not wait for a long one, and there are `max_builds` at most. One that nobody waits for any
    more stops at its next turn and goes on from there when it is asked for again. A failed build is forgotten, so that
    the next request tries again.
    """

    def __init__(self, executor: Executor, *, capacity: int = 64, max_builds: int = 8) -> None:
        """Build on `executor`; keep at most `capacity` classifiers, and more only while they are asked for."""
        self._executor = executor
        self._capacity = capacity
        self._max_builds = max_builds
        self._num_builds = 0
        self._entries: OrderedDict[ClassifierKey, _Build] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.contextmanager
    def asked(
        self,
        model_digest: str,
        class_names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[Sequence[str]], np.ndarray],
    ) -> Iterator[Future[np.ndarray]]:
        """The weights float32 `[C, D]` of a class list: already there, being built, or now to be built.

        They are built for as long as somebody is inside the block. The future is shared by everybody who asks for the
        same key.

        Args:
            model_digest: of the weights that `build` uses.
            class_names: C names.
            templates: what each name is put into; part of the key, and of what a row costs.
            build: rows of a few of the names.

        Raises:
            TooManyBuildsError: it is not there, and `max_builds` others are under construction.
        """
        entry = self._enter((model_digest, tuple(class_names), tuple(templates)), build)
        try:
            yield entry.future
        finally:
            with self._lock:
                entry.num_asking -= 1
                self._evict()

    def _enter(self, key: ClassifierKey, build: Callable[[Sequence[str]], np.ndarray]) -> _Build:
        with self._lock:
            entry = self._entries.get(key) or _Build(key, build)
            if not entry.future.done() and not entry.is_going:
                if self._num_builds >= self._max_builds:
                    raise TooManyBuildsError(f"{self._num_builds} text classifiers are under construction already")
                entry.is_going = True
                self._num_builds += 1
                self._executor.submit(self._turn, entry)
            entry.num_asking += 1
            self._entries[key] = entry
            self._entries.move_to_end(key)
            self._evict()
        return entry

    def _turn(self, entry: _Build) -> None:
        if self._is_left(entry):
            return
        try:
            is_whole = entry.step()
        except Exception as error:
            self._end(entry, forget=True)
            entry.future.set_exception(error)
            return
        if is_whole:
            entry.future.set_result(np.concatenate(entry.rows))
            entry.rows.clear()
            self._end(entry)
        else:
            # Behind the turns of the others.
            self._executor.submit(self._turn, entry)

    def _is_left(self, entry: _Build) -> bool:
        """Whether nobody waits for it any more, so that its build has stopped."""
        with self._lock:
            if entry.num_asking:
                return False
            entry.is_going = False
            self._num_builds -= 1
            return True

    def _end(self, entry: _Build, *, forget: bool = False) -> None:
        with self._lock:
            entry.is_going = False
            self._num_builds -= 1
            if forget and self._entries.get(entry.key) is entry:
                del self._entries[entry.key]

    def _evict(self) -> None:
        spare = len(self._entries) - self._capacity
        idle = [key for key, entry in self._entries.items() if not entry.num_asking] if spare > 0 else []
        for key in idle[:spare]:
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
