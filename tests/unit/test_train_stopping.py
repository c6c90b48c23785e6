"""Which of our callbacks Ray Train calls, and when the driver takes its workers for training: without a cluster."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.callback_manager import CallbackManager
from ray.train.v2._internal.execution.controller import state

from dermray.train import stopping


class Channel:
    """A mailbox that notes what is sent to it."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self.sent.append((name, *arguments)))


def called_by_ray(channel: Channel) -> tuple[CallbackManager, UserCallbackHandler]:
    """The callbacks as Ray Train's trainer and controller deal them out."""
    scaling, run = ScalingConfig(num_workers=1), RunConfig(callbacks=stopping.callbacks(channel))  # type: ignore[arg-type]
    found = TorchTrainer(lambda: None, scaling_config=scaling, run_config=run)._create_default_callbacks()
    ours = [one for one in found if isinstance(one, ControllerCallback) and type(one).__module__ == stopping.__name__]
    (handler,) = (one for one in found if isinstance(one, UserCallbackHandler))
    return CallbackManager(ours), handler


def test_the_controller_says_where_it_is_and_who_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="here"))
    channel = Channel()
    of_controller, of_user = called_by_ray(channel)
    of_controller.invoke("after_controller_start", None)
    errors = {1: ValueError("worn\nout"), 0: OSError("gone")}
    of_user.after_worker_group_poll_status(SimpleNamespace(errors=errors))  # type: ignore[arg-type]
    said = "worker 0 (and 1 more) failed or is lost: OSError: gone"
    assert channel.sent == [("put_controller", "here"), ("tell", said)]


def test_only_workers_that_are_started_anew_do_not_train() -> None:
    """A run that ends still has the checkpoint to write that was asked of it."""
    channel = Channel()
    of_controller, _ = called_by_ray(channel)
    error, decision = SimpleNamespace(), SimpleNamespace()
    passed = [
        state.InitializingState(), state.SchedulingState(decision), state.SchedulingState(decision),
        state.RunningState(), state.RunningState(), state.RestartingState(error), state.ReschedulingState(error),
        state.RunningState(), state.ResizingState(decision), state.RunningState(),
        state.ShuttingDownState(state.FinishedState()), state.FinishedState(), state.ErroredState(error),
        state.AbortedState(),
    ]  # fmt: skip
    told = []
    for before, now in pairwise(passed):
        channel.sent.clear()
        of_controller.invoke("after_controller_state_update", before, now)
        told += [type(now).__name__ for _ in channel.sent]
    assert told == ["SchedulingState", "RestartingState", "ReschedulingState", "ResizingState"]
    known = {name for name in vars(state) if name.endswith("State") and name != "TrainControllerState"}
    assert known == {type(one).__name__ for one in passed} | {"PreemptingState"}, "Ray has other states now"
