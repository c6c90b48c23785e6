"""Elastic runs: of the world sizes that a cluster could hold, those whose global batches are the same.

Ray Train's elastic policy takes as many workers as fit between two bounds, 3 or 7 too; the plan's streams can only be
shared by some numbers. So the policy is narrowed to these; what does not fit into one of them stays idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from dermray import cluster, ray_private
from dermray.errors import PlanError


def admitted_sizes(world_sizes: Iterable[int], *, least: int, most: int) -> tuple[int, ...]:
    """The world sizes between two bounds that a plan admits, ascending.

    Raises:
        PlanError: there is none.
    """
    sizes = sorted(world_sizes)
    admitted = tuple(size for size in sizes if least <= size <= most)
    if not admitted:
        raise PlanError(
            f"no number of workers between {least} and {most} can share the streams evenly; this corpus and global "
            f"batch admit {', '.join(map(str, sizes))} workers"
        )
    return admitted


def fitting_size(
    admitted: tuple[int, ...], possible: int, *, num_cpus: float, cpus_per_worker: float, decoding_cpus: float
) -> int:
    """The largest admitted size of at most `possible` workers that leaves CPUs for decoding; 0 if there is none.

    Args:
        num_cpus: of the whole cluster.
        decoding_cpus: what one decoding task needs; without it training would wait for ever.
    """
    return max(
        (size for size in admitted if size <= possible and size * cpus_per_worker + decoding_cpus <= num_cpus),
        default=0,
    )


class AdmittedSizesPolicy(ray_private.ELASTIC_POLICY.get()):  # type: ignore[misc]
    """Ray Train's elastic policy over admitted sizes only; lives in the controller."""

    def __init__(self, scaling_config: ScalingConfig, admitted: tuple[int, ...], decoding_cpus: float) -> None:
        super().__init__(scaling_config)
        self._admitted = admitted
        self._decoding_cpus = decoding_cpus

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        return fitting_size(
            self._admitted,
            super()._count_possible_workers(reserved_resources),
            num_cpus=ray.cluster_resources().get("CPU", 0.0),
            cpus_per_worker=(self.scaling_config.resources_per_worker or {}).get("CPU", 0.0),
            decoding_cpus=self._decoding_cpus,
        )


class QuietTorchTrainer(TorchTrainer):
    """A TorchTrainer that leaves signals to `dermray.interrupts`; Ray's own would end an interrupted process with 0.

    On a cluster of this machine's own it goes without Ray's cleaner of placement groups, a process that asks a
    dashboard whether the controller lives. Where there is none, another cluster's on this machine answers in its place
    that the controller is not there, and the cleaner ends the training.
    """

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if not cluster.is_own():
            return callbacks
        return [one for one in callbacks if not isinstance(one, ray_private.GROUP_CLEANER.get())]


class ElasticTorchTrainer(QuietTorchTrainer):
    """A TorchTrainer whose worker group has one of some sizes; it is resized at a failure or when nodes come."""

    def __init__(self, *arguments: Any, admitted: tuple[int, ...], decoding_cpus: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._policy = AdmittedSizesPolicy(self.scaling_config, admitted, decoding_cpus)

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        # Ray has no public way to bring a policy of one's own; this is where it hands over the one it made.
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": self._policy})
