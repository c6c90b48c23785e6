"""Peak memory and time of CLIP's loss, forward and backward: `python benchmarks/loss.py [global batch …]`.

Our three methods and open_clip's own loss on one process that holds the whole global batch, features of 512 numbers in
float32; the methods take turns. Memory is what comes on top of the features. Runs on a GPU if there is one, whose
allocator counts. On a CPU each measurement is a fresh process, since memory once had is not always given back, and the
ratio of times is one of core seconds, which other users of the machine disturb less than those of the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import open_clip.loss
import psutil
import torch
from torch import Tensor, nn

from dermray import entry
from dermray.losses import ClipLoss

GLOBAL_BATCH_SIZES = (4096, 8192, 16384, 32768, 65536)
WIDTH = 512
ROUNDS = 3
# On a CPU one round of the largest takes minutes.
ONE_ROUND_FROM = 65536
# Others use the machine too; a method is left out where its matrices would fill it.
MAX_MEMORY_SHARE = 0.8
METHODS = ("open_clip", "dense", "local", "tiled")


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return 0
    sizes = [int(size) for size in sys.argv[1:]] or list(GLOBAL_BATCH_SIZES)
    print(f"{'batch':>6}  {'method':<9}  {'peak MiB':>9}  {'dense / it':>10}  {'seconds':>8}  {'it / dense':>10}")
    peaks: dict[str, tuple[int, int]] = {}
    for size in sizes:
        chosen = [method for method in METHODS if fits(method, size, peaks)]
        rounds = 1 if size >= ONE_ROUND_FROM and not torch.cuda.is_available() else ROUNDS
        once = measure if torch.cuda.is_available() else in_fresh_process
        runs = [{method: once(method, size) for method in chosen} for _ in range(rounds)]
        for method in METHODS:
            if method in chosen:
                peaks[method] = (size, int(statistics.median(run[method]["peak_bytes"] for run in runs)))
                print_row(size, method, runs)
            else:
                print(f"{size:>6}  {method:<9}  left out: its matrices would not fit the free memory", flush=True)
    return 0


def fits(method: str, size: int, peaks: dict[str, tuple[int, int]]) -> bool:
    """From the peak at the size before: memory that is not the tiles' grows with the square."""
    if method == "tiled":
        return True
    smaller, peak = peaks.get(method, (size, 4 * 4 * size * size))
    return peak * (size / smaller) ** 2 <= MAX_MEMORY_SHARE * free_bytes()


def free_bytes() -> int:
    if not torch.cuda.is_available():
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def print_row(size: int, method: str, runs: list[dict[str, dict[str, float]]]) -> None:
    """Medians over rounds; ratios are formed inside each round first."""

    def median(key: str) -> float:
        return statistics.median(run[method][key] for run in runs)

    less, slower = "-", "-"
    if "dense" in runs[0]:
        less = f"{statistics.median(run['dense']['peak_bytes'] / run[method]['peak_bytes'] for run in runs):.1f}"
        slower = f"{statistics.median(run[method]['cost_s'] / run['dense']['cost_s'] for run in runs):.2f}"
    print(
        f"{size:>6}  {method:<9}  {median('peak_bytes') / 2**20:>9,.0f}  {less:>10}  {median('seconds'):>8.4f}  "
        f"{slower:>10}",
        flush=True,
    )


def in_fresh_process(method: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", method, str(size)]
    # Threads that wait for each other must not count as busy.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def measure(method: str, size: int) -> dict[str, float]:
    """One forward and backward after a small one: seconds, what they cost, and peak bytes above the features."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As both trainers have it.
    torch.backends.cuda.matmul.allow_tf32 = True
    loss: nn.Module = open_clip.loss.ClipLoss() if method == "open_clip" else ClipLoss(method)  # type: ignore[arg-type]
    torch.manual_seed(0)
    forward_and_backward(loss, *pairs(1024, device))
    image, text = pairs(size, device)
    before = start_watching_memory(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    forward_and_backward(loss, image, text)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    cost_s = seconds if device.type == "cuda" else cpu_s
    return {"seconds": seconds, "cost_s": cost_s, "peak_bytes": peak_bytes(device) - before}


def pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features that agree somewhat, as after some training."""
    image = torch.randn(size, WIDTH, device=device)
    text = image + torch.randn(size, WIDTH, device=device)
    return tuple(nn.functional.normalize(each, dim=1).requires_grad_() for each in (image, text))  # type: ignore[return-value]


def forward_and_backward(loss: nn.Module, image: Tensor, text: Tensor) -> None:
    scale = torch.tensor(14.3, device=image.device, requires_grad=True)
    loss(image, text, scale).backward()
    # Waits for the device.
    assert scale.grad is not None
    assert scale.grad.isfinite().item()


def start_watching_memory(device: torch.device) -> int:
    """Forget earlier peaks; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, which counts in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
