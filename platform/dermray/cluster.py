"""Which Ray cluster a driver works on, one that is named or one of this machine's own; and what fits into it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from dermray import interrupts, node_watch, ray_private, redaction
from dermray.config import ClusterConfig
from dermray.errors import ConfigError

# The controller takes one report per poll; Ray's default of 2 s would delay checkpoints and stops.
TRAIN_POLL_INTERVAL_S = "0.2"
_OWN_CLUSTER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": TRAIN_POLL_INTERVAL_S,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **redaction.OF_RAY_NODES,
}


# A resource of an own cluster: the cores behind its logical CPUs.
_CORES = "cores"
# Without these processes on its own machine a driver waits in vain.
_VITAL = ("raylet", "gcs_server")
# How long the removal of a session folder may take.
REMOVE_WITHIN_S = 2.0
_logs_are_kept = False
# Of Linux: processes below this one whose parent dies become its children.
_PR_SET_CHILD_SUBREAPER = 36


def connect(config: ClusterConfig) -> None:
    """Join the configured cluster, or start one on this machine. Does nothing when already connected.

    It says when it joins or starts one and when that is done. The session folder of an own cluster (Ray's logs, below
    `/tmp/ray`) is removed when this process ends, unless `keep_logs` was called.
    """
    import ray

    for key, value in _OWN_CLUSTER_ENV.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        return
    # Ray warns that an own cluster asks for its token, which is what we want.
    logging.getLogger(ray_private.AUTHENTICATION_LOGGER).setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": config.log_to_driver, "logging_level": logging.WARNING}
    own_session = ""
    with interrupts.kept():
        if address:
            print("joining a Ray cluster …", flush=True)
            ray.init(address=address, **options)
            print(f"joined it: {_amount(num_cpus(), 'logical CPU')} on {_amount(num_nodes(), 'node')}", flush=True)
        else:
            own_session = _start_own(config, options)
    _watch_vital_processes(own_session)
    _quieten_data()


def _start_own(config: ClusterConfig, options: Mapping[str, Any]) -> str:
    """Start a cluster; its session folder."""
    import ray

    cores = os.cpu_count() or 1
    num_cpus = config.num_cpus or 2 * cores
    own = {_CORES: float(min(cores, num_cpus))}
    print(f"starting a Ray cluster of this machine's own, with {_amount(num_cpus, 'logical CPU')} …", flush=True)
    started = time.monotonic()
    _adopt_orphans()
    # None: one if its packages are there.
    dashboard = None if config.dashboard else False
    context = ray.init(
        address="local",
        num_cpus=num_cpus,
        resources=own,
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        **options,
    )
    # Whoever may read the token's file may see it, as with the cluster's own ports.
    url = context.dashboard_url
    where = f"; dashboard: http://{url}, which asks for what `ray get-auth-token` prints" if url else ""
    print(f"Ray is up after {time.monotonic() - started:.0f} s{where}", flush=True)
    session = str(context.address_info["session_dir"])
    # Registered after Ray's own handler, so it runs before that.
    atexit.register(_remove_session, session, os.getpid())
    return session


def _adopt_orphans() -> None:
    """Have what a process of the own cluster leaves behind when it dies found among this one's children."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_logs() -> None:
    """What went wrong may stand in Ray's logs: leave the session folder of an own cluster where it is."""
    global _logs_are_kept
    _logs_are_kept = True


def _remove_session(folder: str, owner: int) -> None:
    """End the own cluster and remove its session folder; in a process that was forked from ours, nothing."""
    import ray

    if os.getpid() != owner:
        return
    ray.shutdown()
    if interrupts.loss() is not None:
        # What a raylet that was killed had started; some of it would look for it for a while.
        interrupts.kill_children()
    # Workers end by themselves once they see that the raylet is gone; nothing of theirs is wanted any more.
    node_watch.end_processes_of(os.path.realpath(folder))
    deadline = time.monotonic() + REMOVE_WITHIN_S
    # Processes that are still ending may write a last line.
    while not _logs_are_kept and os.path.isdir(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


def _quieten_data() -> None:
    """Stages print progress of their own; Ray Data's bars, and its notes on them, would bury it.

    Nor does it say what ends a dataset: `pieces` raises that, or goes on without a traceback.
    """
    import ray.data

    logging.getLogger(ray_private.DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)
    logging.getLogger(ray_private.DATA_EXECUTION_LOGGER).setLevel(logging.WARNING)
    for name in (ray_private.DATA_EXECUTOR_LOGGER, "ray.data.exceptions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def is_own() -> bool:
    """Whether the connected cluster is one that `connect` has started, on one machine."""
    import ray

    return _CORES in ray.cluster_resources()


def num_cpus() -> float:
    """Logical CPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0.0))


def cpus_of_cores(cores: float) -> float:
    """Logical CPUs to reserve for work that keeps so many cores busy; never more than the connected cluster has.

    They are the same on a cluster that was joined. An own cluster counts a core as several CPUs, since most tasks wait
    for input; those that only compute would push each other off the cores and out of their caches.
    """
    import ray

    resources = ray.cluster_resources()
    cpus = resources.get("CPU", 0.0)
    return float(min(cores * cpus / resources.get(_CORES, cpus), cpus)) if cpus else cores


def num_gpus() -> float:
    """GPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def num_nodes() -> int:
    """Nodes of the connected cluster."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def require(noun: str, needs: Mapping[str, float], *, count: int = 1, advice: str) -> None:
    """Refuse what can never run: an own cluster stays as it is. Another one may grow, so there it waits.

    Args:
        noun: what the processes are: "training worker".
        needs: resources (`CPU`, `GPU`) that each of `count` of them takes on one node.
        advice: which keys to change.

    Raises:
        ConfigError: the nodes do not hold so many.
    """
    import ray

    if not is_own():
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(
        min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items() if amount), default=count)
        for node in nodes
    )
    if fitting < count:
        here = " and ".join(_amount(sum(node.get(name, 0.0) for node in nodes), name) for name in needs)
        raise ConfigError(
            f"{in_words(noun, needs, count=count)} would wait for ever: this machine's cluster has {here}; {advice}"
        )


def in_words(noun: str, needs: Mapping[str, float], *, count: int = 1) -> str:
    """What takes which resources: "2 training workers of 1 CPU and 1 GPU"."""
    each = " and ".join(_amount(amount, name) for name, amount in needs.items() if amount)
    return f"{_amount(count, noun)} of {each}"


def waiting(what: str) -> Callable[[], str]:
    """What `dermray.progress` says is waited for: "2 encoders of 1 CPU; free now: 0 of 4 CPUs, 0 of 0 GPUs"."""
    return lambda: f"{what}; {free()}"


def free() -> str:
    """What of the connected cluster is free, in words."""
    import ray

    total, left = ray.cluster_resources(), ray.available_resources()
    parts = [f"{left.get(name, 0.0):g} of {_amount(total.get(name, 0.0), name)}" for name in ("CPU", "GPU")]
    return f"free now: {', '.join(parts)}"


def _amount(number: float, name: str) -> str:
    return f"{number:g} {name}{'' if number == 1 else 's'}"


def _watch_vital_processes(own_session: str) -> None:
    """End the job with a word when Ray's own processes on this machine die: Ray's driver would wait, or just exit.

    Args:
        own_session: session folder of an own cluster, of which nothing may outlive this process; or empty.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    socket = next((node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here), None)
    watched = _vital_processes(f"--raylet_socket_name={socket}")
    beside = node_watch.begin(watched, session=own_session)
    # Registered last, so it runs first: what ends by itself has said why.
    atexit.register(_end_of, beside, os.getpid())
    threading.Thread(target=_wait_for_a_death, args=(watched,), name="ray-node-watch", daemon=True).start()


def _end_of(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _vital_processes(socket: str) -> dict[int, str]:
    """By process id, what they are, in the order of `_VITAL`: "raylet, process 17"."""
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            name, is_own = process.name(), process.ppid() == os.getpid()
            if name in _VITAL and (is_own or socket in process.cmdline()):
                found[process.pid] = name
    return {pid: f"{name}, process {pid}" for name in _VITAL for pid, its in found.items() if its == name}


def _wait_for_a_death(watched: Mapping[int, str]) -> None:
    import ray

    names: dict[int, str] = {}
    for pid, name in watched.items():
        with contextlib.suppress(ProcessLookupError):
            names[os.pidfd_open(pid)] = name
    poll = select.poll()
    for descriptor in names:
        poll.register(descriptor, select.POLLIN)
    (dead, _), *_ = poll.poll()
    for descriptor in names:
        os.close(descriptor)
    if ray.is_initialized():
        interrupts.lose(node_watch.lost(names[dead]))
