"""Checkpoints: the manifest commits; damage falls back; another run's are refused by the keys that differ."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dermray import storage
from dermray.errors import CheckpointError
from dermray.train import checkpoint
from dermray.train.settings import PretrainConfig

TRAJECTORY = {"seed": 0, "optim.lr": 0.1, "data.captions": {"raw": 1.0}}
CORPUS = "c" * 64


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((4,), float(step))}, "metrics": {"loss": 1 / step}}


def save(output: Path, step: int, *, keep: int = 2) -> checkpoint.CheckpointInfo:
    return checkpoint.save(str(output), step, state(step), trajectory=TRAJECTORY, corpus_digest=CORPUS, keep=keep)


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
    original = storage._write_local
    monkeypatch.setattr(
        storage, "_write_local", lambda path, data: (written.append(path.name), original(path, data))[1]
    )
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


def test_state_is_read_without_running_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "opened",)

    checkpoint.save(str(tmp_path), 4, {"step": Payload()}, trajectory=TRAJECTORY, corpus_digest=CORPUS, keep=1)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load(tmp_path)
    assert not (tmp_path / "opened").exists()


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


def test_a_trajectory_survives_its_manifest(tmp_path: Path) -> None:
    """What JSON makes of a real trajectory must equal the trajectory, or no run could ever resume."""
    config = PretrainConfig.model_validate(
        {"corpus": "c", "output": "o", "data": {"captions": {"ontology": 0.1, "raw": 1 / 3}}, "optim": {"lr": 1e-5 / 3}}
    )
    checkpoint.save(str(tmp_path), 4, state(4), trajectory=config.trajectory(), corpus_digest=CORPUS, keep=1)
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
        {"data": {"cpus_per_task": 1, "tasks_per_worker": 3}},
        {"validation": {"every_steps": 3}},
        {"loss": {"method": "dense"}},
        {"train": {"micro_batch_size": 64}},
    ],
)
def test_keys_that_do_not_decide_them_may_change(override: dict[str, Any]) -> None:
    base = {"corpus": "c", "output": "o"}
    assert PretrainConfig(**base).trajectory() == PretrainConfig(**(base | override)).trajectory()
