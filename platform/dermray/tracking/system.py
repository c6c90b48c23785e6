"""System metrics of the driver's machine, read by MLflow's own monitors and logged like any other figure."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

# The UI shows what begins so in a tab of its own.
PREFIX = "system/"


class SystemSampler:
    """A thread that reads processor, memory, disk, network and graphics cards every `interval_s` seconds.

    The step of a reading is the seconds since the run began, so that a restarted run goes on behind what it has. Within
    a process they are counted without the clock on the wall, which may be set back or forward.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], *, interval_s: float, began_at: float) -> None:
        """Call `log(figures, step)` from now on; `began_at` is the Unix time of the run's first start."""
        self._log = log
        self._interval_s = interval_s
        self._origin = time.monotonic() - max(0.0, time.time() - began_at)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        monitors = _monitors()
        while not self._stop.wait(self._interval_s):
            figures: dict[str, float] = {}
            for monitor in monitors:
                # A card or a counter that fails for once costs its own reading.
                with contextlib.suppress(Exception):
                    monitor.collect_metrics()
                    figures |= {f"{PREFIX}{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
            if figures:
                self._log(figures, int(time.monotonic() - self._origin))


def _monitors() -> list[Any]:
    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    # Without NVIDIA's library or card it refuses.
    with contextlib.suppress(Exception):
        found.append(GPUMonitor())
    return found
