"""Two real gloo processes: flags are seen by both at the same step, and who waits in vain says for whom."""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dermray.errors import CollectiveError
from dermray.losses.gather import gather_rows
from dermray.train.agreement import Agreement, Position
from tests.process_groups import run_ranks

RAISED_AT = 3
TIMEOUT_S = 3


def flags_seen(rank: int, world_size: int) -> dict[str, Any]:
    """Only the last rank raises a flag, at one step; what each rank sees at every step."""
    agreement = Agreement(num_flags=2, timeout_s=60)
    seen = []
    for step in range(6):
        time.sleep(0.01 * rank)
        seen.append(agreement.exchange(False, rank == world_size - 1 and step == RAISED_AT))
        if step % 2:
            agreement.wait()
        if world_size > 1:
            dist.all_reduce(torch.ones(1))
    agreement.close()
    return {"seen": [second for _, second in seen], "other": any(first for first, _ in seen)}


def test_all_ranks_see_a_flag_at_the_same_step(tmp_path: Path) -> None:
    answers = run_ranks(flags_seen, (1, 2), tmp_path)
    assert answers[1] == [{"seen": [step == RAISED_AT for step in range(6)], "other": False}]
    late = {"seen": [step == RAISED_AT + 1 for step in range(6)], "other": False}
    assert answers[2] == [late, late]


def _wait_in_vain(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/world",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    position = Position(TIMEOUT_S)
    position.note(7, "waiting for a batch")
    # The flags have a group and a time-out of their own: on a GPU they tell before NCCL's watchdog does.
    agreement = Agreement(num_flags=1, timeout_s=1)
    dist.barrier()
    if rank == 1:
        time.sleep(3 * TIMEOUT_S)
        return

    def exchange() -> None:
        agreement.exchange(False)
        agreement.wait()

    for name, doing, wait in (
        ("flags", "exchanging figures and flags", exchange),
        ("gather", "in the forward and backward pass", lambda: gather_rows(torch.ones(1))),
    ):
        try:
            with position.at(7, doing):
                wait()
        except CollectiveError as error:
            (Path(folder) / name).write_text(str(error))


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What rank 0 says while rank 1 hangs, by the place where it waits."""
    folder = tmp_path_factory.mktemp("hanging")
    mp.spawn(_wait_in_vain, args=(str(folder),), nprocs=2)
    return {name: (folder / name).read_text() for name in ("flags", "gather")}


def test_a_rank_that_does_not_hand_in_its_flags_is_named(messages: dict[str, str]) -> None:
    assert "for others in all_reduce at step 7, exchanging figures and flags" in messages["flags"]
    assert "rank 1 is at step 7, waiting for a batch" in messages["flags"]


def test_a_rank_that_hangs_is_named_with_step_collective_and_place(messages: dict[str, str]) -> None:
    message = messages["gather"]
    assert "rank 0 waited" in message
    assert "for others in all_gather_single at step 7, in the forward and backward pass" in message
    assert "rank 1 is at step 7, waiting for a batch" in message
    assert f"train.collective_timeout_s={TIMEOUT_S}" in message
    assert "\n" not in message


def test_a_rank_0_that_was_stopped_does_not_hold_up_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermray.train.agreement._NOTES_TIMEOUT_S", 0.1)
    answered = threading.Event()

    class Stopped:
        def set(self, key: str, value: str) -> None: ...

        def check(self, keys: list[str]) -> bool:
            answered.wait(60)
            return False

    position = Position(TIMEOUT_S)
    position._rank, position._world_size, position._store = 1, 2, Stopped()
    try:
        with (
            pytest.raises(CollectiveError, match="rank 1 waited 0 s .* rank 0 does not answer"),
            position.at(7, "here"),
        ):
            raise RuntimeError("gloo: timed out")
    finally:
        answered.set()


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="this rank is alone"), Position(1).at(1, "anywhere"):
        raise RuntimeError("gloo, but this rank is alone")
