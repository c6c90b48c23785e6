"""Checkpoints and scratch files that nothing needs any more, found without removing anything.

Garbage is, under the given folders and old enough:

- checkpoints of a training that has finished (`summary.json`) or of a trial that a sweep has stopped;
- scratch folders of Ray Train and Ray Tune of what has finished;
- files that were being written when their writer died (`.name….part`).

It is kept all the same if a run or a model version names it or something in it, if the run that wrote it is RUNNING,
or if it belongs to the training of a version that has an alias. A training that has not finished keeps everything: it
may be taken up again. Corpora, models and reports are never garbage here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dermray import storage
from dermray.config import TrackingConfig
from dermray.errors import TrackingError
from dermray.storage import Stored
from dermray.tracking.needed import Needed, needed
from dermray.tracking.spool import Spool, header, left_over, spool_folder

CHECKPOINTS = "checkpoints"
FINISHED_NAME, TRIAL_NAME, BEST_NAME = "summary.json", "trial.json", "best.yaml"
# Of a folder that has finished: what Ray left in it.
SCRATCH = {"ray-train": FINISHED_NAME, "tune": BEST_NAME}
MANIFEST_NAME = "manifest.json"
STOPPED = "stopped"
SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True)
class Item:
    """A folder or file that looks like garbage; `kept_for` says why it is not, and is empty if it is.

    Attributes:
        kind: checkpoint, scratch or part.
        output: of the training or sweep that it belongs to.
    """

    uri: str
    kind: str
    output: str
    num_bytes: int
    written_at: float
    kept_for: str = ""

    @property
    def is_garbage(self) -> bool:
        """Nothing needs it."""
        return not self.kept_for

    def to_json(self) -> dict[str, Any]:
        """A document with the same fields."""
        return asdict(self)


def find(config: TrackingConfig, roots: Sequence[str], *, min_age_days: float) -> list[Item]:
    """Everything under `roots` that looks like garbage, what is kept for a reason included.

    Args:
        roots: URIs of folders.
        min_age_days: what was written later is kept.

    Raises:
        TrackingError: MLflow is out of reach or has not been told everything yet, so that nobody knows what is needed.
    """
    live = _live_outputs(spool_folder(config.spool))
    needs = needed(config)
    needs.outputs |= live
    youngest = time.time() - min_age_days * SECONDS_A_DAY
    found = [item for root in roots for item in _looks_like_garbage(storage.normalise(root))]
    return [_judged(item, needs, youngest) for item in found]


def _live_outputs(folder: Path) -> dict[str, str]:
    """Outputs of jobs that are at work on this machine, which MLflow may not have heard of.

    Raises:
        TrackingError: a job that is gone has left something that MLflow has not been told.
    """
    found = {}
    for path in left_over(folder):
        spool = Spool.left_over(path)
        if spool is not None:
            waits = spool.num_pending_bytes > 0
            spool.close()
            if waits:
                raise TrackingError(f"{path} holds what MLflow has not yet been told; run jobs/deliver.py first")
            continue
        output = header(path).get("params", {}).get("output")
        if output:
            found[output] = "a job of this machine is at work on it"
    return found


def remove(item: Item) -> None:
    """Remove an item; what is half removed does not look whole.

    Raises:
        ValueError: it is kept for a reason.
    """
    if not item.is_garbage:
        raise ValueError(f"{item.uri} is kept: {item.kept_for}")
    # Of a linked folder, the link alone is ours.
    if not (storage.is_local(item.uri) and storage.local_path(item.uri).is_symlink()):
        storage.remove(storage.join(item.uri, MANIFEST_NAME))
    storage.remove(item.uri)


def _judged(item: Item, needs: Needed, youngest: float) -> Item:
    reason = needs.reason(item.uri)
    if not reason and item.written_at > youngest:
        reason = "written lately"
    return Item(**{**asdict(item), "kept_for": reason})


def _looks_like_garbage(root: str) -> list[Item]:
    files = storage.list_stored(root)
    present = {file.uri for file in files}
    groups: dict[tuple[str, str, str], list[Stored]] = defaultdict(list)
    for file in files:
        group = _group(file.uri, root, present)
        if group is not None:
            groups[group].append(file)
    return [
        Item(uri, kind, output, sum(f.num_bytes for f in members), max(f.written_at for f in members))
        for (uri, kind, output), members in sorted(groups.items())
    ]


def _group(uri: str, root: str, present: set[str]) -> tuple[str, str, str] | None:
    """The item that a file belongs to: its URI, kind and output."""
    segments = uri[len(root) :].strip("/").split("/")
    for depth, segment in enumerate(segments[:-1]):
        output = storage.join(root, *segments[:depth])
        if segment == CHECKPOINTS and depth + 1 < len(segments) - 1 and _is_over(output, present):
            return storage.join(output, segment, segments[depth + 1]), "checkpoint", output
        marker = SCRATCH.get(segment)
        if marker is not None and storage.join(output, marker) in present:
            return storage.join(output, segment), "scratch", output
    name = segments[-1]
    if name.startswith(".") and name.endswith(storage.PART):
        return uri, "part", uri.rpartition("/")[0]
    return None


def _is_over(output: str, present: set[str]) -> bool:
    if storage.join(output, FINISHED_NAME) in present:
        return True
    trial = storage.join(output, TRIAL_NAME)
    return trial in present and storage.read_object(trial).get("status") == STOPPED
