"""Whole jobs in this process: what they have Ray do, done here, so that a test may be between any two requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dermray import cluster, ledger, pieces
from dermray.ingest import tasks
from dermray.train import pretrain, worker
from dermray.train.settings import PretrainConfig


@dataclass(frozen=True, eq=False)
class _Ref:
    """What became of a task: its result, or what it raised."""

    result: Any
    error: Exception | None = None


def _get(refs: Sequence[_Ref]) -> list[Any]:
    for ref in refs:
        if ref.error is not None:
            raise ref.error
    return [ref.result for ref in refs]


def _copied(result: Any) -> Any:
    """As Ray copies results: a task lends memory that it uses again."""
    return {name: array.copy() for name, array in result.items()} if isinstance(result, dict) else result


def _remote(**_: Any) -> Callable[[Callable[..., Any]], SimpleNamespace]:
    def task(function: Callable[..., Any]) -> SimpleNamespace:
        def remote(*arguments: Any) -> _Ref:
            try:
                known = [_get([one])[0] if isinstance(one, _Ref) else one for one in arguments]
                return _Ref(_copied(function(*known)))
            except Exception as error:
                return _Ref(None, error)

        return SimpleNamespace(remote=remote)

    return task


def _run(todo: Mapping[str, Any], work: Callable[[Any], Any], *_: object, **__: object) -> Iterator[tuple[str, Any]]:
    for name, piece in todo.items():
        yield name, work(piece)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have preparations, evaluations and `train` need no cluster."""
    monkeypatch.setattr(pieces, "run", _run)
    monkeypatch.setattr(cluster, "num_gpus", lambda: 0.0)
    monkeypatch.setattr(cluster, "num_cpus", lambda: 2.0)
    monkeypatch.setattr(cluster, "cpus_of_cores", lambda cores: cores)
    monkeypatch.setattr(cluster, "require", lambda *_, **__: None)
    monkeypatch.setattr(cluster, "free", lambda: "")
    monkeypatch.setattr(tasks, "ray", SimpleNamespace(remote=_remote, get=_get, cancel=lambda _: None))
    monkeypatch.setattr(worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker.ray.train, "report", lambda *_: None)
    monkeypatch.setattr(worker, "StopPoll", lambda _: lambda: False)
    monkeypatch.setattr(worker, "wait_until_heard", lambda _: None)


def train(config: PretrainConfig) -> dict[str, Any]:
    """A whole pretraining of one rank: what the driver does before and after, and the worker between; its summary."""
    config = pretrain.located(config)
    quiet = SimpleNamespace(remote=lambda *_: None)
    channel: Any = SimpleNamespace(load=quiet, ready=quiet, push=quiet)
    with ledger.claim(config.output) as claim:
        pretrain.check(config)
        return worker.train_worker(config, {}, claim, channel)
