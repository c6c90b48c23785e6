"""Checkpoints as commit points: a folder per step whose manifest is written last.

    OUTPUT/checkpoints/step-00000200/state.pt        model, optimiser, step; read with weights_only=True
    OUTPUT/checkpoints/step-00000200/manifest.json   step, size and SHA-256 of the state, trajectory, corpus digest

Order and augmentation are functions of the step, so the state holds no position and no random numbers.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import torch

from dermray import storage
from dermray.errors import CheckpointError

FOLDER = "checkpoints"
STATE_NAME = "state.pt"
MANIFEST_NAME = "manifest.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint."""

    uri: str
    step: int
    sha256: str
    trajectory: dict[str, Any]
    corpus_digest: str


def save(
    output: str, step: int, state: dict[str, Any], *, trajectory: dict[str, Any], corpus_digest: str, keep: int
) -> CheckpointInfo:
    """Commit the state reached after `step` optimiser steps and remove all but the last `keep` checkpoints."""
    uri = storage.join(output, FOLDER, f"step-{step:08d}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    info = CheckpointInfo(uri, step, hashlib.sha256(data).hexdigest(), trajectory, corpus_digest)
    storage.write_bytes(storage.join(uri, STATE_NAME), data)
    storage.write_json(
        storage.join(uri, MANIFEST_NAME),
        {
            "step": step,
            "num_bytes": len(data),
            "sha256": info.sha256,
            "trajectory": trajectory,
            "corpus_digest": corpus_digest,
        },
    )
    _remove_before(output, committed(output)[-keep:][0].step)
    return info


def _remove_before(output: str, step: int) -> None:
    """Remove every older folder, also what a kill left half written or half removed."""
    for uri in storage.list_folders(storage.join(output, FOLDER)):
        if int(storage.name_of(uri).removeprefix("step-")) < step:
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
            CheckpointInfo(uri, manifest["step"], manifest["sha256"], manifest["trajectory"], manifest["corpus_digest"])
        )
    return sorted(found, key=lambda info: info.step)


def load_latest(
    output: str, *, trajectory: dict[str, Any], corpus_digest: str
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint whose bytes are what its manifest says, or None for a fresh start.

    Raises:
        CheckpointError: a checkpoint belongs to another corpus or to other settings; names the keys that differ.
    """
    for info in reversed(committed(output)):
        require_same_run(info, trajectory=trajectory, corpus_digest=corpus_digest)
        try:
            data = storage.read_bytes(storage.join(info.uri, STATE_NAME))
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            logger.warning("%s is damaged (its digest differs); going back to the one before", info.uri)
            continue
        return info, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return None


def require_same_run(info: CheckpointInfo, *, trajectory: dict[str, Any], corpus_digest: str) -> None:
    """Refuse to continue something else than what was begun.

    Raises:
        CheckpointError: the corpus or a key of the trajectory differs.
    """
    if info.corpus_digest != corpus_digest:
        raise CheckpointError(
            f"{info.uri} was trained on another corpus (digest {info.corpus_digest[:12]}, now {corpus_digest[:12]}); "
            "give a new output, or the corpus it began with"
        )
    differing = [
        f"{key} was {info.trajectory.get(key)!r}, now {trajectory.get(key)!r}"
        for key in sorted({*info.trajectory, *trajectory})
        if info.trajectory.get(key) != trajectory.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{info.uri} was made with other settings: {'; '.join(differing)}. Give a new output, or the old settings"
        )
