"""Checkpoints as commit points: a folder per step whose manifest is written last.

    OUTPUT/checkpoints/step-00000200/state.pt        model, optimiser, step; read with weights_only=True
    OUTPUT/checkpoints/step-00000200/manifest.json   step, size and SHA-256 of the state, trajectory, corpus, scores

Order and augmentation are functions of the step, so the state holds no position and no random numbers.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dermray import storage
from dermray.errors import CheckpointError

FOLDER = "checkpoints"
STATE_NAME = "state.pt"
MANIFEST_NAME = "manifest.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint; `scores` are those of a validation at this very step, if there was one."""

    uri: str
    step: int
    sha256: str
    trajectory: dict[str, Any]
    corpus_digest: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last few and, by one of their scores, the best one.

    Attributes:
        last: how many of the newest.
        best: key of a validation score, or None.
        mode: whether the highest or the lowest score is best; of equals the newest.
    """

    last: int
    best: str | None = None
    mode: Literal["max", "min"] = "max"

    def kept(self, infos: list[CheckpointInfo]) -> set[int]:
        """Steps of those that stay.

        Args:
            infos: all that are committed, by ascending step.
        """
        steps = {info.step for info in infos[-self.last :]}
        scored = [info for info in infos if self.best is not None and self.best in info.scores]
        if self.best is not None and scored:
            sign = 1 if self.mode == "max" else -1
            steps.add(max(scored, key=lambda info: (sign * info.scores[self.best or ""], info.step)).step)
        return steps


def save(
    output: str,
    step: int,
    state: dict[str, Any],
    *,
    trajectory: dict[str, Any],
    corpus_digest: str,
    retention: Retention,
    scores: Mapping[str, float] | None = None,
) -> CheckpointInfo:
    """Commit the state reached after `step` optimiser steps and remove what `retention` does not keep.

    Args:
        scores: of a validation at this step.
    """
    uri = storage.join(output, FOLDER, f"step-{step:08d}")
    with storage.staged(storage.join(uri, STATE_NAME)) as path:
        torch.save(state, path)
        sha256, num_bytes = _sha256(path), path.stat().st_size
    info = CheckpointInfo(uri, step, sha256, trajectory, corpus_digest, dict(scores or {}))
    _commit(info, num_bytes)
    _remove_others(output, retention.kept(committed(output)), newest=step)
    return info


def adopt(
    donor: CheckpointInfo, output: str, *, trajectory: dict[str, Any], corpus_digest: str, sha256: str
) -> CheckpointInfo:
    """Commit a copy of another run's checkpoint, to be gone on with under these settings; what `output` had goes.

    A call that was interrupted can be repeated.

    Args:
        sha256: of the state that is meant; the donor may have gone on since.

    Raises:
        CheckpointError: the donor trained on another corpus, or its state is not the one that is meant.
    """
    if donor.corpus_digest != corpus_digest:
        raise CheckpointError(f"{donor.uri} was trained on another corpus (digest {donor.corpus_digest[:12]})")
    data = storage.read_bytes(storage.join(donor.uri, STATE_NAME))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{donor.uri} is damaged or was replaced: its state has not the digest {sha256[:12]}")
    uri = storage.join(output, FOLDER, f"step-{donor.step:08d}")
    for old in storage.list_folders(storage.join(output, FOLDER)):
        storage.remove(storage.join(old, MANIFEST_NAME))
        storage.remove(old)
    storage.write_bytes(storage.join(uri, STATE_NAME), data)
    info = CheckpointInfo(uri, donor.step, sha256, trajectory, corpus_digest, donor.scores)
    _commit(info, len(data))
    return info


def _commit(info: CheckpointInfo, num_bytes: int) -> None:
    storage.write_json(
        storage.join(info.uri, MANIFEST_NAME),
        {
            "step": info.step,
            "num_bytes": num_bytes,
            "sha256": info.sha256,
            "trajectory": info.trajectory,
            "corpus_digest": info.corpus_digest,
            "scores": info.scores,
        },
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_others(output: str, kept: set[int], *, newest: int) -> None:
    """Remove every older folder that is not kept, also what a kill left half written or half removed."""
    for uri in storage.list_folders(storage.join(output, FOLDER)):
        step = int(storage.name_of(uri).removeprefix("step-"))
        if step < newest and step not in kept:
            # The manifest goes first: what is half removed must not look whole.
            storage.remove(storage.join(uri, MANIFEST_NAME))
            storage.remove(uri)


def committed(output: str) -> list[CheckpointInfo]:
    """The checkpoints that have a manifest, by ascending step."""
    found = []
    for uri in storage.list_folders(storage.join(output, FOLDER)):
        try:
            manifest = storage.read_json(storage.join(uri, MANIFEST_NAME))
        except FileNotFoundError:
            continue
        found.append(
            CheckpointInfo(
                uri,
                manifest["step"],
                manifest["sha256"],
                manifest["trajectory"],
                manifest["corpus_digest"],
                manifest.get("scores", {}),
            )
        )
    return sorted(found, key=lambda info: info.step)


def load_latest(
    output: str, *, trajectory: dict[str, Any], corpus_digest: str, force: bool = False
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint whose bytes are what its manifest says, or None for a fresh start.

    Args:
        force: go on although the corpus or the settings differ.

    Raises:
        CheckpointError: a checkpoint belongs to another corpus or to other settings; names the keys that differ.
    """
    for info in reversed(committed(output)):
        require_same_run(info, trajectory=trajectory, corpus_digest=corpus_digest, force=force)
        try:
            data = storage.read_bytes(storage.join(info.uri, STATE_NAME))
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            logger.warning("%s is damaged (its digest differs); going back to the one before", info.uri)
            continue
        return info, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return None


def require_same_run(
    info: CheckpointInfo, *, trajectory: dict[str, Any], corpus_digest: str, force: bool = False
) -> None:
    """Refuse to continue something else than what was begun.

    Args:
        force: say what differs in the log instead.

    Raises:
        CheckpointError: the corpus or a key of the trajectory differs.
    """
    found = differences(info, trajectory=trajectory, corpus_digest=corpus_digest)
    if not found:
        return
    if force:
        logger.warning("%s; resume=force goes on all the same", found)
        return
    raise CheckpointError(f"{found}. Give a new output, what it began with, or resume=force")


def differences(info: CheckpointInfo, *, trajectory: dict[str, Any], corpus_digest: str) -> str:
    """What a checkpoint was made with that is otherwise now, in words; empty if nothing is."""
    if info.corpus_digest != corpus_digest:
        return f"{info.uri} was trained on another corpus (digest {info.corpus_digest[:12]}, now {corpus_digest[:12]})"
    differing = [
        f"{key} was {info.trajectory.get(key)!r}, now {trajectory.get(key)!r}"
        for key in sorted({*info.trajectory, *trajectory})
        if info.trajectory.get(key) != trajectory.get(key)
    ]
    return f"{info.uri} was made with other settings: {'; '.join(differing)}" if differing else ""
