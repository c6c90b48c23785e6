"""How fast a run is and what limits it: a stopwatch, memory, the peak of a card."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Dense bf16 matrix FLOP/s by a part of the device's name, as the vendor states them; the first that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "A40": 150e12,
    "A10G": 70e12,
    "L4": 121e12,
}
# A share of the time above which something else than the model is worth looking at.
NOTABLE_SHARE = 0.15


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for a CPU and for other cards."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def memory_gb(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, on a GPU, the most that torch has reserved, in 10^9 bytes."""
    figures = {"host_memory_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        figures["gpu_memory_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return figures


def verdict(metrics: dict[str, float]) -> str:
    """In one line, what limits a run whose figures these are; `num_hosts` is how many machines its workers are on."""
    shares = {
        "data": metrics.get("data_wait_share", 0.0),
        "communication": metrics.get("communication_share", 0.0),
        "validation and checkpoints": metrics.get("pause_share", 0.0),
    }
    advice = {
        "data": "add CPUs for decoding, or raise data.tasks_per_worker",
        "communication": (
            "a larger global batch, or a faster network"
            if metrics.get("num_hosts", 1) > 1
            else "a larger global batch, or fewer workers on this machine"
        ),
        "validation and checkpoints": "less often: validation.every_steps, train.checkpoint_every_steps",
    }
    limit = max(shares, key=lambda key: shares[key])
    if shares[limit] < NOTABLE_SHARE:
        return f"limited by computation ({1 - sum(shares.values()):.0%} of the time)"
    return f"limited by {limit} ({shares[limit]:.0%} of the time): {advice[limit]}"


def exposed_communication_s(model: nn.Module) -> float:
    """Seconds a step in which a backward pass waited for gradients of other ranks; 0 without DDP.

    DistributedDataParallel measures the first ten steps and then every hundredth. The loss's exchanges do not count.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    figures = model._get_ddp_logging_data()
    hidden = figures.get("avg_backward_compute_comm_overlap_time", 0)
    return max(0.0, (figures.get("avg_backward_comm_time", 0) - hidden) / 1e9)


Mark = float | torch.cuda.Event


class Stopwatch:
    """Throughput, waits and step times between two logged steps; without the first batch, validation, checkpoints.

    On a GPU the marks are events in its stream: a wait is time that the card idled, not that the host stood still.
    """

    def __init__(self, first_step: int, global_batch_size: int, device: torch.device) -> None:
        self._global_batch_size = global_batch_size
        self._first_step = self._step = first_step
        self._on_gpu = device.type == "cuda"
        self._trained_s = 0.0
        self._begun: float | None = None
        self._paused_s = 0.0
        self._ended: Mark | None = None
        self._came: Mark = 0.0
        self._waits: list[tuple[Mark, Mark]] = []
        self._steps: list[tuple[Mark, Mark]] = []

    def batch_came(self) -> None:
        """After the wait for a batch."""
        self._came = self._mark()
        if self._begun is None:
            self._begun, self._ended = time.perf_counter(), self._came
        assert self._ended is not None
        self._waits.append((self._ended, self._came))

    def step_done(self) -> None:
        """After every step."""
        assert self._ended is not None
        begun, self._ended = self._ended, self._mark()
        self._steps.append((begun, self._ended))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        entered = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - entered
        self._ended = self._mark()

    def lap(self, step: int) -> dict[str, float]:
        """Figures since the last lap."""
        assert self._begun is not None
        durations = [_seconds(*pair) for pair in self._steps]
        waited_s = sum(_seconds(*pair) for pair in self._waits)
        now = time.perf_counter()
        whole_s = max(now - self._begun, 1e-9)
        elapsed_s = max(whole_s - self._paused_s, 1e-9)
        self._trained_s += elapsed_s
        num_steps = step - self._step
        p50, p99 = np.percentile(durations, [50, 99])
        figures = {
            "samples_per_s": num_steps * self._global_batch_size / elapsed_s,
            "mean_samples_per_s": (step - self._first_step) * self._global_batch_size / self._trained_s,
            "step_time_s": elapsed_s / num_steps,
            "step_time_p50_s": float(p50),
            "step_time_p99_s": float(p99),
            "data_wait_share": min(waited_s / elapsed_s, 1.0),
            "pause_share": min(self._paused_s / whole_s, 1.0),
        }
        self._begun, self._step, self._paused_s = now, step, 0.0
        self._waits, self._steps = [], []
        return figures

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(earlier: Mark, later: Mark) -> float:
    if isinstance(earlier, torch.cuda.Event):
        assert isinstance(later, torch.cuda.Event)
        later.synchronize()
        return earlier.elapsed_time(later) / 1000
    assert isinstance(later, float)
    return later - earlier
