"""Checkpoints: the manifest commits; damage falls back; another run's are refused by the keys that differ."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dermray import storage
from dermray.config import Config, DecidesWeights, LeavesWeights
from dermray.errors import CheckpointError, StorageError
from dermray.train import checkpoint
from dermray.train.settings import PretrainConfig
from dermray.train.trajectory import decisive, undeclared

TRAJECTORY = {"seed": 0, "optim.lr": 0.1, "data.captions": {"raw": 1.0}}
CORPUS = "c" * 64


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((4,), float(step))}, "metrics": {"loss": 1 / step}}


def save(output: Path, step: int, *, keep: int = 2) -> checkpoint.CheckpointInfo:
    return checkpoint.save(
        str(output),
        step,
        state(step),
        trajectory=TRAJECTORY,
        corpus_digest=CORPUS,
        retention=checkpoint.Retention(keep),
    )


def load(output: Path, **changes: Any) -> tuple[checkpoint.CheckpointInfo, dict[str, Any]] | None:
    return checkpoint.load_latest(str(output), **({"trajectory": TRAJECTORY, "corpus_digest": CORPUS} | changes))


def loaded_step(output: Path) -> int | None:
    latest = load(output)
    if latest is None:
        return None
    info, content = latest
    assert torch.equal(content["model"]["w"], torch.full((4,), float(info.step)))
    assert content["step"] == info.step
    return info.step


def names(output: Path) -> list[str]:
    return sorted(folder.name for folder in (output / checkpoint.FOLDER).iterdir())


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.committed(str(tmp_path)) == []
    assert load(tmp_path) is None


def test_the_newest_is_loaded_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 100_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000008", "step-100000000"]
    assert [info.step for info in checkpoint.committed(str(tmp_path))] == [8, 100_000_000]
    assert loaded_step(tmp_path) == 100_000_000
    save(tmp_path, 100_000_004, keep=1)
    assert names(tmp_path) == ["step-100000004"]


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which files appear, seen at the file system's border."""
    written: list[str] = []
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 4)
    assert written == [checkpoint.STATE_NAME, checkpoint.MANIFEST_NAME]


def test_without_its_manifest_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 4)
    later = save(tmp_path, 8)
    (Path(later.uri) / checkpoint.MANIFEST_NAME).unlink()
    assert loaded_step(tmp_path) == 4
    save(tmp_path, 8)
    assert loaded_step(tmp_path) == 8


def test_what_a_killed_removal_left_is_swept_up(tmp_path: Path) -> None:
    """A kill between removing a manifest and removing its state must not leave the state for ever."""
    save(tmp_path, 4)
    (Path(save(tmp_path, 8).uri) / checkpoint.MANIFEST_NAME).unlink()
    save(tmp_path, 12)
    save(tmp_path, 16)
    assert names(tmp_path) == ["step-00000012", "step-00000016"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "removed"])
def test_damaged_bytes_fall_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 4)
    file = Path(save(tmp_path, 8).uri) / checkpoint.STATE_NAME
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 4
    assert "step-00000008 is damaged" in caplog.text
    (tmp_path / checkpoint.FOLDER / "step-00000004" / checkpoint.STATE_NAME).write_bytes(b"")
    assert load(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"step": 8}',
        b"[" * 100_000,
        b'{"step": "eight", "sha256": "", "trajectory": {}, "corpus_digest": ""}',
        b'{"step": 4, "sha256": "", "trajectory": {}, "corpus_digest": ""}',
        b'{"step": 8, "sha256": 1, "trajectory": {}, "corpus_digest": ""}',
        b'{"step": 8, "sha256": "", "trajectory": [], "corpus_digest": ""}',
        b'{"step": 8, "sha256": "", "trajectory": {}, "corpus_digest": "", "scores": {"loss": "low"}}',
    ],
)
def test_a_damaged_manifest_falls_back_to_the_one_before(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 4)
    manifest = Path(save(tmp_path, 8).uri) / checkpoint.MANIFEST_NAME
    manifest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 4
    assert f"{manifest} is damaged (" in caplog.text
    save(tmp_path, 8)
    assert loaded_step(tmp_path) == 8
    assert names(tmp_path) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize(
    "folder", ["notes", "step-", "step-best", "step-00000004-copy", "step-12", ".ipynb_checkpoints"]
)
def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path, folder: str) -> None:
    mine = tmp_path / checkpoint.FOLDER / folder / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("not a checkpoint", encoding="utf-8")
    (tmp_path / checkpoint.FOLDER / "notes.txt").write_text("nor this", encoding="utf-8")
    for step in (4, 8, 12):
        save(tmp_path, step, keep=1)
    assert loaded_step(tmp_path) == 12
    donor = save(tmp_path / "donor", 8)
    checkpoint.adopt(donor, str(tmp_path), trajectory=TRAJECTORY, corpus_digest=CORPUS, sha256=donor.sha256)
    assert names(tmp_path) == sorted([folder, "notes.txt", "step-00000008"])
    assert mine.read_text(encoding="utf-8") == "not a checkpoint"


def test_the_older_ones_stay_until_the_newer_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something takes the state away as soon as its manifest is there."""
    save(tmp_path, 4, keep=1)
    original = storage.write_json

    def write_json(uri: str, document: Any) -> None:
        original(uri, document)
        (Path(uri).parent / checkpoint.STATE_NAME).unlink()

    donor = save(tmp_path / "donor", 8)
    monkeypatch.setattr(storage, "write_json", write_json)
    with pytest.raises(StorageError, match=r"step-00000008: .* is gone"):
        save(tmp_path, 8, keep=1)
    with pytest.raises(StorageError, match=r"step-00000008: .* is gone"):
        checkpoint.adopt(donor, str(tmp_path), trajectory=TRAJECTORY, corpus_digest=CORPUS, sha256=donor.sha256)
    assert loaded_step(tmp_path) == 4


def test_state_is_read_without_running_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "opened",)

    checkpoint.save(
        str(tmp_path),
        4,
        {"step": Payload()},
        trajectory=TRAJECTORY,
        corpus_digest=CORPUS,
        retention=checkpoint.Retention(1),
    )
    with pytest.raises(CheckpointError, match="step-00000004/state.pt is no state of a run"):
        load(tmp_path)
    assert not (tmp_path / "opened").exists()


def packed(content: Any, *, inflated_bytes: int = 0) -> bytes:
    """A state's file; with `inflated_bytes` its tensor's bytes are deflated zeros."""
    made, packed_again = io.BytesIO(), io.BytesIO()
    torch.save(content, made)
    if not inflated_bytes:
        return made.getvalue()
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(packed_again, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            is_tensor = "/data/0" in entry.filename
            target.writestr(entry.filename, bytes(inflated_bytes) if is_tensor else source.read(entry.filename))
    return packed_again.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk" * 9,
        packed([1, 2]),
        packed({"model": {}}),
        packed({"step": 10**9}),
        packed({"step": 4, "w": torch.zeros(4)}, inflated_bytes=1 << 24),
    ],
    ids=["empty", "junk", "list", "without step", "other step", "bomb"],
)
def test_bytes_that_the_manifest_vouches_for_and_are_no_state_end_in_one_line(tmp_path: Path, data: bytes) -> None:
    uri = Path(save(tmp_path, 4).uri)
    manifest = json.loads((uri / checkpoint.MANIFEST_NAME).read_text())
    (uri / checkpoint.STATE_NAME).write_bytes(data)
    manifest |= {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    (uri / checkpoint.MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state.pt is no state of a run \(.*\); remove its folder"):
        load(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.MANIFEST_NAME, checkpoint.STATE_NAME])
def test_a_folder_in_a_files_place_falls_back_to_the_one_before(tmp_path: Path, name: str) -> None:
    save(tmp_path, 4)
    file = Path(save(tmp_path, 8).uri) / name
    file.unlink()
    file.mkdir()
    assert loaded_step(tmp_path) == 4


def test_of_a_linked_checkpoint_the_link_alone_goes(tmp_path: Path) -> None:
    """Somebody has linked another run's checkpoint in, and gone on from it."""
    theirs = Path(save(tmp_path / "theirs", 4).uri)
    (tmp_path / "mine" / checkpoint.FOLDER).mkdir(parents=True)
    (tmp_path / "mine" / checkpoint.FOLDER / theirs.name).symlink_to(theirs)
    save(tmp_path / "mine", 8, keep=1)
    assert names(tmp_path / "mine") == ["step-00000008"]
    assert loaded_step(tmp_path / "theirs") == 4


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"trained on another corpus \(digest cccccccccccc, now dddddddddddd\)"):
        load(tmp_path, corpus_digest="d" * 64)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, trajectory={"seed": 0, "optim.lr": 0.2, "data.captions": {"raw": 1.0}, "optim.new": 1})
    message = str(caught.value)
    assert "optim.lr was 0.1, now 0.2" in message
    assert "optim.new was None, now 1" in message
    assert "seed" not in message
    assert "captions" not in message


def test_force_goes_on_all_the_same_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        latest = load(tmp_path, trajectory={**TRAJECTORY, "optim.lr": 0.2}, force=True)
    assert latest is not None
    assert latest[0].step == 4
    assert "optim.lr was 0.1, now 0.2; resume=force goes on all the same" in caplog.text


@pytest.mark.parametrize(("mode", "expected"), [("max", {8, 16}), ("min", {12, 16})])
def test_the_best_stays_beside_the_last(tmp_path: Path, mode: Any, expected: set[int]) -> None:
    retention = checkpoint.Retention(1, "x", mode)
    for step, scores in ((4, {"x": 2.0}), (8, {"x": 2.0}), (12, {"x": 1.0, "y": 9.0}), (16, {})):
        checkpoint.save(
            str(tmp_path),
            step,
            state(step),
            trajectory=TRAJECTORY,
            corpus_digest=CORPUS,
            retention=retention,
            scores=scores,
        )
    assert {info.step for info in checkpoint.committed(str(tmp_path))} == expected
    assert loaded_step(tmp_path) == 16


def test_the_best_by_no_score_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.keep_best needs validation\.every_steps"):
        PretrainConfig.model_validate({"corpus": "c", "output": "o", "train": {"keep_best": "x"}})


def test_a_trajectory_survives_its_manifest(tmp_path: Path) -> None:
    """What JSON makes of a real trajectory must equal the trajectory, or no run could ever resume."""
    config = PretrainConfig.model_validate(
        {"corpus": "c", "output": "o", "data": {"captions": {"ontology": 0.1, "raw": 1 / 3}}, "optim": {"lr": 1e-5 / 3}}
    )
    checkpoint.save(
        str(tmp_path),
        4,
        state(4),
        trajectory=config.trajectory(),
        corpus_digest=CORPUS,
        retention=checkpoint.Retention(1),
    )
    assert load(tmp_path, trajectory=config.trajectory()) is not None
    assert json.loads(json.dumps(config.trajectory())) == config.trajectory()


@pytest.mark.parametrize(
    "override",
    [
        {"model": "RN50"},
        {"pretrained": "openai"},
        {"seed": 1},
        {"train": {"epochs": 2}},
        {"train": {"global_batch_size": 8}},
        {"train": {"precision": "bf16"}},
        {"train": {"grad_clip_norm": 1.0}},
        {"train": {"ema_decay": 0.99}},
        {"data": {"split": "val"}},
        {"data": {"captions": {"raw": 1.0, "concept": 1.0}}},
        {"data": {"crop_scale": [0.5, 1.0]}},
        {"data": {"horizontal_flip": 0.5}},
        {"optim": {"warmup_steps": 3}},
        {"loss": {"name": "siglip"}},
        {"loss": {"mask_duplicates": True}},
    ],
)
def test_keys_that_decide_the_weights_are_in_the_trajectory(override: dict[str, Any]) -> None:
    base = {"corpus": "c", "output": "o"}
    assert PretrainConfig(**base).trajectory() != PretrainConfig(**base, **override).trajectory()


@pytest.mark.parametrize(
    "override",
    [
        {"output": "elsewhere"},
        {"run_name": "x"},
        {"num_workers": 4},
        {"train": {"log_every_steps": 1, "checkpoint_every_steps": 3, "keep_checkpoints": 5, "max_failures": 0}},
        {"data": {"cpus_per_task": 1, "tasks_per_worker": 3, "verify": "pages"}},
        {"validation": {"every_steps": 3}},
        {"loss": {"method": "dense"}},
        {"train": {"micro_batch_size": 64}},
        {"train": {"checkpoint_every_minutes": 5, "max_skipped_steps": 0, "grace_s": 5}},
        {"train": {"tf32": False, "channels_last": True, "compile": True, "grad_checkpointing": 0.5}},
        {"resume": "force"},
    ],
)
def test_keys_that_do_not_decide_them_may_change(override: dict[str, Any]) -> None:
    base = {"corpus": "c", "output": "o"}
    assert PretrainConfig(**base).trajectory() == PretrainConfig(**(base | override)).trajectory()


def test_every_key_says_whether_it_decides_the_weights() -> None:
    class Forgetful(Config):
        told: DecidesWeights[int] = 1
        forgotten: int = 1

    class Run(Config):
        section: Forgetful = Forgetful()
        apart: LeavesWeights[Forgetful] = Forgetful()

    assert undeclared(PretrainConfig) == []
    assert undeclared(Run) == ["section.forgotten"]
    assert decisive(Run()) == {"section.told": 1}
