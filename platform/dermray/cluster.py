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
        num_cpus = config.num_cpus or 2 * (os.cpu_count() or 1)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
    # Stages print progress of their own; Ray Data's bars, and its notes on them, would bury it.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def num_cpus() -> float:
    """Logical CPUs of the connected cluster."""
    return float(ray.cluster_resources().get("CPU", 0.0))


def num_gpus() -> float:
    """GPUs of the connected cluster."""
    return float(ray.cluster_resources().get("GPU", 0.0))
