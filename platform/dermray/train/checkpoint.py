"""Checkpoints as commit points: a folder per step whose manifest is written last.

    OUTPUT/checkpoints/step-00000200/state.pt        model, optimiser, step; read with weights_only=True
    OUTPUT/checkpoints/step-00000200/manifest.json   step, size and SHA-256 of the state, trajectory, corpus, scores

Order and augmentation are functions of the step, so the state holds no position and no random numbers.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from dermray import storage
from dermray.corpus.shares import DIGESTS_JOIN
from dermray.errors import CheckpointError, StorageError

FOLDER = "checkpoints"
STATE_NAME = "state.pt"
MANIFEST_NAME = "manifest.json"
# Keys that earlier versions did not have, with what their runs did.
BEFORE_THERE_WERE = {
    "objective.kind": "contrastive",
    "data.fraction": 1.0,
    "train.lock": [],
    "train.lock_image_unlocked_groups": 0,
    "train.lock_text_unlocked_layers": 0,
    "optim.schedule": "cosine",
    "optim.cooldown_epochs": None,
    "optim.cooldown_power": 1.0,
    "optim.cooldown_lr": 0.0,
    "optim.factors": {},
    "loss.soft_targets": False,
    "loss.temperature": 0.07,
    "loss.beta": 0.5,
    "loss.divergence": "cross_entropy",
    "objective.lambda_k": 0.4,
    "objective.scale_jitter": 0.0,
    "objective.scale_jitter_max": 2.0,
}
# What a run draws of its corpora, as a digest (`dermray.train.epochs`); of earlier checkpoints it is not known.
DRAWS = "draws of the objective"
# Digests of the weights that a run reads and does not train; not known of earlier checkpoints, nor of a folder that is
# gone.
FROZEN = "weights of frozen models"
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")

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


_INFO = TypeAdapter(CheckpointInfo)


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
    confirm: Callable[[], None] = lambda: None,
) -> CheckpointInfo:
    """Commit the state reached after `step` optimiser steps and remove what `retention` does not keep.

    Nothing is removed before the store has confirmed the new state (see `object_stores.put`) and its manifest is read.

    Args:
        scores: of a validation at this step.
        confirm: called before the manifest is written; raises if the output is no longer the run's.

    Raises:
        StorageError: it cannot be written, or is not there afterwards; the older checkpoints stay.
    """
    uri = storage.join(output, FOLDER, f"step-{step:08d}")
    with storage.staged(storage.join(uri, STATE_NAME)) as path:
        _write_state(state, path)
        sha256, num_bytes = _sha256(path), path.stat().st_size
    info = CheckpointInfo(uri, step, sha256, trajectory, corpus_digest, dict(scores or {}))
    confirm()
    _commit(info, num_bytes)
    _remove_others(output, retention.kept(committed(output)), newest=step)
    return info


def _write_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # What the disk said is behind torch's "unexpected pos".
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def adopt(
    donor: CheckpointInfo, output: str, *, trajectory: dict[str, Any], corpus_digest: str, sha256: str
) -> CheckpointInfo:
    """Commit a copy of another run's checkpoint, to be gone on with under these settings; what `output` had goes.

    It goes once the copy is there. A call that was interrupted can be repeated.

    Args:
        sha256: of the state that is meant; the donor may have gone on since.

    Raises:
        CheckpointError: the donor trained on another corpus, or its state is not the one that is meant.
        StorageError: the copy cannot be written, or is not there afterwards; what `output` had stays.
    """
    if donor.corpus_digest != corpus_digest:
        raise CheckpointError(f"{donor.uri} was trained on another corpus (digest {donor.corpus_digest[:12]})")
    data = storage.read_bytes(storage.join(donor.uri, STATE_NAME))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{donor.uri} is damaged or was replaced: its state has not the digest {sha256[:12]}")
    uri = storage.join(output, FOLDER, f"step-{donor.step:08d}")
    storage.write_bytes(storage.join(uri, STATE_NAME), data)
    info = CheckpointInfo(uri, donor.step, sha256, trajectory, corpus_digest, donor.scores)
    _commit(info, len(data))
    for old, step in _folders(output):
        if step != donor.step:
            _remove(old)
    return info


def _commit(info: CheckpointInfo, num_bytes: int) -> None:
    """Write the manifest of a state that is written, and see that both are there."""
    manifest, state = storage.join(info.uri, MANIFEST_NAME), storage.join(info.uri, STATE_NAME)
    storage.write_json(
        manifest,
        {
            "step": info.step,
            "num_bytes": num_bytes,
            "sha256": info.sha256,
            "trajectory": info.trajectory,
            "corpus_digest": info.corpus_digest,
            "scores": info.scores,
        },
    )
    try:
        read, found_bytes = storage.read_json(manifest), storage.size_bytes(state)
    except FileNotFoundError as error:
        raise StorageError(f"{info.uri}: what was just written is gone ({error}); does something remove it?") from None
    if read["sha256"] != info.sha256 or found_bytes != num_bytes:
        raise StorageError(f"{info.uri}: another checkpoint was written there meanwhile; give each run its own output")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_others(output: str, kept: set[int], *, newest: int) -> None:
    """Remove every older checkpoint that is not kept, also what a kill left half written or half removed."""
    for uri, step in _folders(output):
        if step < newest and step not in kept:
            _remove(uri)


def _remove(uri: str) -> None:
    # The manifest goes first: what is half removed must not look whole. Of a linked folder, the link alone is ours.
    if not (storage.is_local(uri) and storage.local_path(uri).is_symlink()):
        storage.remove(storage.join(uri, MANIFEST_NAME))
    storage.remove(uri)


def _folders(output: str) -> list[tuple[str, int]]:
    """URI and step of each folder of a checkpoint; others that lie beside them are not ours."""
    uris = storage.list_folders(storage.join(output, FOLDER))
    matches = ((uri, _STEP_FOLDER.fullmatch(storage.name_of(uri))) for uri in uris)
    return [(uri, int(match[1])) for uri, match in matches if match]


def committed(output: str) -> list[CheckpointInfo]:
    """The checkpoints that have a manifest, by ascending step; one whose manifest is damaged is none."""
    infos = [_read_info(uri, step) for uri, step in _folders(output)]
    return sorted((info for info in infos if info is not None), key=lambda info: info.step)


def _read_info(uri: str, step: int) -> CheckpointInfo | None:
    """The checkpoint in a folder; None where there is no manifest, or one that is damaged, which the log is told."""
    manifest = storage.join(uri, MANIFEST_NAME)
    try:
        data = storage.read_bytes(manifest)
    except (FileNotFoundError, IsADirectoryError):
        return None
    try:
        info = _INFO.validate_python({**storage.parse_json(data, manifest), "uri": uri})
        if info.step != step:
            raise ValueError(f"it is of step {info.step}")
    except (StorageError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("%s is damaged (%s); this checkpoint does not count", manifest, reason)
        return None
    return info


def load_latest(
    output: str, *, trajectory: dict[str, Any], corpus_digest: str, force: bool = False
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint whose bytes are what its manifest says, or None for a fresh start.

    Args:
        force: go on although the corpus or the settings differ.

    Raises:
        CheckpointError: a checkpoint belongs to another corpus or to other settings; names the keys that differ. Or its
            bytes are those of the manifest, and no state of a run.
    """
    for info in reversed(committed(output)):
        require_same_run(info, trajectory=trajectory, corpus_digest=corpus_digest, force=force)
        try:
            data = storage.read_bytes(storage.join(info.uri, STATE_NAME))
        except (FileNotFoundError, IsADirectoryError):
            data = b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            logger.warning("%s is damaged (its digest differs); going back to the one before", info.uri)
            continue
        return info, _state_of(info, data)
    return None


def _state_of(info: CheckpointInfo, data: bytes) -> dict[str, Any]:
    """The state in bytes that anybody may have written: nothing in them is run, and they unpack to no more."""
    uri = storage.join(info.uri, STATE_NAME)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                raise ValueError("it unpacks to more than its size")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("step") != info.step:
            raise ValueError(f"it is not of step {info.step}")
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{uri} is no state of a run ({reason}); remove its folder to go on from the checkpoint before"
        ) from None
    return state


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
        return f"{info.uri} was trained on {other_corpora(info.corpus_digest, corpus_digest)}"
    differing = differing_settings(info.trajectory, trajectory)
    return f"{info.uri} was made with other settings: {'; '.join(differing)}" if differing else ""


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two trajectories, each key in words; keys that an earlier version lacked have its value."""
    before, now = {**BEFORE_THERE_WERE, **before}, {**BEFORE_THERE_WERE, **now}
    return [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and (key not in (DRAWS, FROZEN) or (key in before and key in now))
    ]


def other_corpora(before: str, now: str) -> str:
    """What differs between the digests of the corpora of two runs, which are not the same."""
    old, new = before.split(DIGESTS_JOIN), now.split(DIGESTS_JOIN)
    if len(old) != len(new):
        return f"other corpora ({len(old)}, now {len(new)})"
    (place, was, to_be), *_ = ((at, a, b) for at, (a, b) in enumerate(zip(old, new, strict=True), 1) if a != b)
    which = "another corpus" if len(old) == 1 else f"another corpus {place} of {len(old)}"
    return f"{which} (digest {was[:12]}, now {to_be[:12]})"
