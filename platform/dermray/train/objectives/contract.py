"""What an objective brings, so that the loop knows a loss, figures and an export, and nothing of what is learned.

The module that an `ObjectiveKind` names has two functions:

    check(config: PretrainConfig) -> None           refuses, in the driver, what could only fail on every worker
    build(config: PretrainConfig, device) -> Built  on every rank, in the same way: all that is drawn is seeded

The order of calls in a step: `schedule`, `Objective.backward`, the optimiser, `Objective.after_step`. Everything that
couples samples is defined over the global batch (`dermray.losses.gather`), so that any world size learns the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from dermray import extensions
from dermray.corpus.side_tables import AMONG_COLUMNS
from dermray.errors import ConfigError
from dermray.ingest.loader import Batch
from dermray.ingest.views import Views
from dermray.train.objectives import kinds
from dermray.train.settings import PretrainConfig

Autocast = Callable[[], AbstractContextManager[Any]]
Scores = dict[str, float]


@dataclass(frozen=True)
class Figure:
    """A number of a step; what is told is the mean over the steps since the last time, joined over ranks."""

    value: Tensor | float
    join: Literal["mean", "max", "sum"] = "mean"


@dataclass(frozen=True)
class Outcome:
    """What `Objective.backward` leaves beside gradients.

    Attributes:
        loss: of this rank, detached; the mean over ranks is the global loss.
        figures: by name; the same names on every rank and at every step.
    """

    loss: Tensor
    figures: Mapping[str, Figure] = field(default_factory=dict)


class Objective:
    """How gradients come about, and what else changes with a step. The base does nothing beside `backward`."""

    def backward(self, model: nn.Module, batch: Batch, device: torch.device, autocast: Autocast) -> Outcome:
        """Add the gradient of the rank's loss to the parameters.

        Args:
            model: perhaps wrapped by DDP, whose ranks must have averaged their gradients on return.
            batch: arrays as the views declare them.
            autocast: makes the context in which the model runs forward.
        """
        raise NotImplementedError

    def after_step(self, model: nn.Module, taken: Tensor) -> None:
        """Constrain parameters, move a teacher.

        Args:
            model: not wrapped.
            taken: float32 `[]` on the device: 1, or 0 for a step that was skipped since its gradient was not finite.
        """

    def report(self, model: nn.Module) -> dict[str, float]:
        """Scalars of the model worth logging, equal on all ranks."""
        return {}

    def flops(self, figures: Mapping[str, float]) -> float | None:
        """FLOPs of a training step for one sample, given the step's figures; None: not known."""
        return None

    def verdict(self, scores: Mapping[str, float]) -> str:
        """What the scores of a validation mean, in a line for whoever watches; empty: they speak for themselves."""
        return ""

    def state(self) -> dict[str, Any]:
        """What changes with the steps and is no parameter of the model: an average, a curriculum. Nothing frozen."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            KeyError, RuntimeError, ValueError: it does not fit.
        """


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike.

    Attributes:
        weight_decay: None: `optim.weight_decay`.
        lr_factor: what the schedule's rate is multiplied with.
    """

    parameters: Sequence[nn.Parameter]
    weight_decay: float | None = None
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Built:
    """An objective ready to train on one rank.

    Attributes:
        model: on the device, in training mode. What is frozen and not exported stays outside; checkpoints hold it all.
        views: what is made of samples.
        schedule: `(step, num_steps)` → rate of groups whose factor is 1; None: warm-up and schedule of `optim`.
        groups: None: those of open_clip, in which norms and biases do not decay.
        unused_parameters: whether some trained parameters may get no gradient in a step.
        validate: scores of a model on held-out samples, by the keys `validation_…`; called on every rank at the same
            step, so that ranks may share the work; what rank 0 answers counts. None: there is no validation.
        export: `(model, uri, provenance)` → SHA-256 of the weights; writes a model folder; called on rank 0.
    """

    model: nn.Module
    objective: Objective
    views: Views
    export: Callable[[nn.Module, str, dict[str, Any]], str]
    validate: Callable[[nn.Module], Scores] | None = None
    schedule: Callable[[int, int], float] | None = None
    groups: Sequence[ParameterGroup] | None = None
    unused_parameters: bool = False


class ObjectiveModule(Protocol):
    """The two functions of an objective's module."""

    def check(self, config: PretrainConfig) -> None:
        """Refuse what could only fail on every worker."""

    def build(self, config: PretrainConfig, device: torch.device) -> Built:
        """Make what a rank trains."""


def require_told(config: PretrainConfig, views: Views) -> None:
    """Refuse views that read side tables of which the driver could not know.

    Raises:
        ConfigError: the objective's `columns` leave some out; names them.
    """
    said = kinds.columns_of(config)
    unsaid = [name for name in views.columns if name.startswith(AMONG_COLUMNS) and name not in said]
    if unsaid:
        raise ConfigError(
            f"objective.kind={config.objective.kind}: its views read {', '.join(unsaid)}; its ObjectiveKind must say "
            "so by `columns`, since a corpus without them is refused before workers start"
        )


def module_of(kind: str) -> ObjectiveModule:
    """What computes an objective, imported.

    Raises:
        ConfigError: its module cannot be imported, or lacks a function.
    """
    name = kinds.find(kind).module
    with extensions.importing(f"objective.kind={kind}: {name}", ConfigError):
        module = importlib.import_module(name)
    missing = [function for function in ("check", "build") if not callable(getattr(module, function, None))]
    if missing:
        raise ConfigError(f"objective.kind={kind}: {name} has no function {' and no function '.join(missing)}")
    return cast(ObjectiveModule, module)
