"""Which Ray cluster a driver works on: one that is named, or one of this machine's own."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
import ray.data

from dermray.config import ClusterConfig

# The controller takes one report per poll; Ray's default of 2 s would delay checkpoints and stops.
TRAIN_POLL_INTERVAL_S = "0.2"
_OWN_CLUSTER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": TRAIN_POLL_INTERVAL_S,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# A resource of an own cluster: the cores behind its logical CPUs.
_CORES = "cores"


def connect(config: ClusterConfig) -> None:
    """Join the configured cluster, or start one on this machine. Does nothing when already connected."""
    for key, value in _OWN_CLUSTER_ENV.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        return
    # Ray warns that an own cluster asks for its token, which is what we want.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": config.log_to_driver, "logging_level": logging.WARNING}
    if address:
        ray.init(address=address, **options)
    else:
        cores = os.cpu_count() or 1
        num_cpus = config.num_cpus or 2 * cores
        own = {_CORES: float(min(cores, num_cpus))}
        ray.init(address="local", num_cpus=num_cpus, resources=own, include_dashboard=False, **options)
    # Stages print progress of their own; Ray Data's bars, and its notes on them, would bury it.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def num_cpus() -> float:
    """Logical CPUs of the connected cluster."""
    return float(ray.cluster_resources().get("CPU", 0.0))


def cpus_of_cores(cores: float) -> float:
    """Logical CPUs to reserve for work that keeps so many cores busy; never more than the connected cluster has.

    They are the same on a cluster that was joined. An own cluster counts a core as several CPUs, since most tasks wait
    for input; those that only compute would push each other off the cores and out of their caches.
    """
    resources = ray.cluster_resources()
    cpus = resources.get("CPU", 0.0)
    return float(min(cores * cpus / resources.get(_CORES, cpus), cpus)) if cpus else cores


def num_gpus() -> float:
    """GPUs of the connected cluster."""
    return float(ray.cluster_resources().get("GPU", 0.0))
