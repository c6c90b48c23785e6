"""What tracking costs: `python benchmarks/tracking.py [--step | --delivery]`.

Overhead: a training loop (the demo's model, forward, backward and AdamW on batches of 32) with a run open that logs 25
figures every tenth step, as the driver of a training does, beside the same loop without; blocks of steps take turns in
one process. This is stricter than the real thing, where the driver's process is not the one that trains.

Delivery: 10,000 points said as fast as they can be, until MLflow has them all: into SQLite, and through a real
`mlflow server` on loopback.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dermray import entry, models, tracking
from dermray.config import Config, TrackingConfig
from dermray.losses import ClipLoss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.mlflow_server import MlflowServer

LOG_EVERY_STEPS = 10
NUM_FIGURES = 25
STEPS_A_BLOCK = 40
NUM_BLOCKS = 9
NUM_RECORDS = 30
BATCH = 32
NUM_POINTS = 10_000
POINTS_A_STEP = 10


class Nothing(Config):
    """A run without settings."""


def main() -> int:
    chosen = sys.argv[1:] or ["--step", "--delivery"]
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
        if "--step" in chosen:
            overhead(Path(folder))
        if "--delivery" in chosen:
            deliveries(Path(folder))
    return 0


def overhead(folder: Path) -> None:
    """Seconds of a block of steps with tracking over those without, pair by pair."""
    step = training_step()
    run_block(step, None)
    config = TrackingConfig(uri=f"sqlite:///{folder}/step.db", spool=str(folder / "spool"))
    ratios, bare = [], []
    with tracking.run(config, kind="benchmark", name="overhead", resolved=Nothing()) as current:
        counter = 0
        for number in range(NUM_BLOCKS):
            sides = {}
            for tracked in (True, False) if number % 2 else (False, True):
                sides[tracked] = run_block(step, current if tracked else None, counter)
                counter += STEPS_A_BLOCK
            ratios.append(sides[True] / sides[False])
            bare.append(sides[False] / STEPS_A_BLOCK)
        step_s = statistics.median(bare)
        own_s = processor_time(current, interval_s=LOG_EVERY_STEPS * step_s, first=counter)
    print(f"training step {step_s * 1000:.1f} ms; with tracking / without:", end=" ")
    print(f"{statistics.median(ratios):.4f} (median of {NUM_BLOCKS} pairs, {min(ratios):.4f} to {max(ratios):.4f})")
    share = own_s / LOG_EVERY_STEPS / step_s
    print(
        f"processor time of a record of {NUM_FIGURES} figures, its delivery and the system metrics meanwhile: "
        f"{own_s * 1000:.2f} ms, {share:.2%} of the {LOG_EVERY_STEPS} steps it stands for"
    )


def processor_time(current: tracking.Run, *, interval_s: float, first: int) -> float:
    """Processor seconds of this process a record, while nothing else runs in it and records come as in a training.

    What the machine does besides does not enter.
    """
    started = time.process_time()
    for number in range(NUM_RECORDS):
        current.log_metrics(figures(), step=first + number)
        time.sleep(interval_s)
    return (time.process_time() - started) / NUM_RECORDS


def training_step() -> Callable[[], None]:
    torch.manual_seed(0)
    model, _, tokenizer = models.create("dermray_tiny")
    optimiser = torch.optim.AdamW(model.parameters())
    side = models.preprocessing(model).size
    images = torch.randn(BATCH, 3, side, side)
    tokens = tokenizer([f"a photograph of condition {number}" for number in range(BATCH)])
    loss = ClipLoss()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        loss(image, text, model.logit_scale.exp()).backward()
        optimiser.step()

    return step


def run_block(step: Callable[[], None], current: tracking.Run | None, first: int = 0) -> float:
    started = time.perf_counter()
    for number in range(first, first + STEPS_A_BLOCK):
        step()
        if current is not None and number % LOG_EVERY_STEPS == 0:
            current.log_metrics(figures(), step=number + 1)
    return time.perf_counter() - started


def figures() -> dict[str, float]:
    return {f"figure_{number}": float(number) for number in range(NUM_FIGURES)}


def deliveries(folder: Path) -> None:
    """Seconds until all points are in."""
    deliver("SQLite", TrackingConfig(uri=f"sqlite:///{folder}/points.db", spool=str(folder / "spool")))
    with server(folder / "server") as url:
        deliver("a server over SQLite", TrackingConfig(uri=url, spool=str(folder / "spool")))


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    with MlflowServer(folder) as running:
        yield running.url


def deliver(where: str, config: TrackingConfig) -> None:
    with tracking.run(config, kind="benchmark", name="points", resolved=Nothing()) as current:
        started = time.perf_counter()
        for step in range(1, NUM_POINTS // POINTS_A_STEP + 1):
            current.log_metrics({f"m{number}": float(step) for number in range(POINTS_A_STEP)}, step=step)
        said = time.perf_counter() - started
        client, run_id = current.connected()
        seconds = time.perf_counter() - started
    found = sum(len(client.get_metric_history(run_id, f"m{number}")) for number in range(POINTS_A_STEP))
    print(
        f"{NUM_POINTS:,} points into {where}: {seconds:.1f} s ({said:.2f} s to say them), {found:,} found", flush=True
    )


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
