"""Peak memory and time of MAKE's loss, forward and backward: `python benchmarks/make_loss.py [batch …]`, `--quick`.

Ours against a straightforward dense form written here from the formulas: every patch with every text of the batch, and
an image's row of logits repeated for each of its texts, as the released code has it; hard targets, weights as meant.
Both give the same value, which is checked. 11 texts a sample, of which some are missing, 196 patches, 512 numbers in
float32 (`--quick`: 49 patches, 64 numbers, batches of 32 and 64). From 1024 samples on ours alone: the dense form's
patch product would not fit. Memory is what comes on top of the features, the gradients of these included. Each
measurement is a fresh process, and the ratio of times is one of core seconds (`benchmarks/loss.py`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from loss import peak_bytes, start_watching_memory
from torch import Tensor

from dermray import entry
from dermray.losses import MakeLoss

TEXTS, SCALE = 11, 14.3
BATCHES, QUICK_BATCHES = (256, 512, 1024, 2048), (32, 64)
# Patches and width.
SHAPE, QUICK_SHAPE = (196, 512), (49, 64)
DENSE_UP_TO = 512
ROUNDS = 3
# float32 sums of different order.
CLOSE = 1e-4


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:6]))))
        return 0
    quick = "--quick" in sys.argv
    given = [int(each) for each in sys.argv[1:] if each != "--quick"]
    rounds = 1 if quick else ROUNDS
    print(f"{'batch':>6}  {'form':<5}  {'peak MiB':>9}  {'core s':>8}  {'seconds':>8}")
    for batch in given or (QUICK_BATCHES if quick else BATCHES):
        forms = ("dense", "ours") if batch <= DENSE_UP_TO else ("ours",)
        shape = QUICK_SHAPE if quick else SHAPE
        runs = [{form: in_fresh_process(form, batch, shape) for form in forms} for _ in range(rounds)]
        print_rows(batch, runs)
    return 0


def print_rows(batch: int, runs: list[dict[str, dict[str, float]]]) -> None:
    """Medians over rounds; ratios are formed inside each round first."""
    for form in runs[0]:
        peak, cost, seconds = (
            statistics.median(run[form][key] for run in runs) for key in ("peak_bytes", "cost_s", "seconds")
        )
        print(f"{batch:>6}  {form:<5}  {peak / 2**20:>9,.0f}  {cost:>8.2f}  {seconds:>8.2f}", flush=True)
    if "dense" in runs[0]:
        less, faster = (
            statistics.median(run["dense"][key] / run["ours"][key] for run in runs) for key in ("peak_bytes", "cost_s")
        )
        apart = max(abs(run["dense"]["value"] - run["ours"]["value"]) for run in runs)
        assert apart < CLOSE, f"the two forms are {apart} apart"
        print(f"{batch:>6}  ours: {less:.1f} times less memory, {faster:.1f} times less core seconds", flush=True)


def in_fresh_process(form: str, batch: int, shape: tuple[int, int]) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", form, str(batch), *map(str, shape)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def measure(form: str, batch: int, patches: int, width: int) -> dict[str, float]:
    """One forward and backward after a small one: seconds, what they cost, peak bytes above the features, the value."""
    cpu = torch.device("cpu")
    loss = {"dense": dense, "ours": MakeLoss()}[form]
    torch.manual_seed(0)
    step(loss, *features(16, patches, width))
    given = features(batch, patches, width)
    before = start_watching_memory(cpu)
    started, cpu_started = time.perf_counter(), time.process_time()
    value = step(loss, *given)
    return {
        "seconds": time.perf_counter() - started,
        "cost_s": time.process_time() - cpu_started,
        "peak_bytes": peak_bytes(cpu) - before,
        "value": value,
    }


def features(batch: int, patches: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, patches and texts that agree somewhat, as after some training, and which texts there are."""
    image = torch.randn(batch, width)
    near = image[:, None] + torch.randn(batch, TEXTS, width)
    leaves = (image, image[:, None] + 3 * torch.randn(batch, patches, width), near)
    valid = torch.rand(batch, TEXTS) < 0.6
    valid[:, 0] = True
    image, patch, text = (F.normalize(each, dim=-1).requires_grad_() for each in leaves)
    return image, patch, text, valid


def step(loss, image: Tensor, patch: Tensor, text: Tensor, valid: Tensor) -> float:
    value = loss(image, patch, text, valid, torch.tensor(SCALE, requires_grad=True))
    value.backward()
    return value.item()


def dense(image: Tensor, patch: Tensor, text: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """The formulas, with every product whole and a row of logits for every text."""
    batch = len(image)
    flat, counted = text.flatten(0, 1), valid.flatten()
    similar = text[:, 1:2].detach() @ text[:, 3:].detach().transpose(1, 2)
    sub = similar[:, 0].masked_fill(~valid[:, 3:], -torch.inf).softmax(dim=1)
    sub = (sub / sub.amax(dim=1, keepdim=True)).where(valid[:, 3:] & valid[:, 1:2], 1.0)
    weights = torch.cat([torch.ones(batch, 3), sub], dim=1).flatten()

    all_pairs = torch.einsum("bpd,td->bpt", patch, flat)
    own = all_pairs[torch.arange(batch), :, torch.arange(batch) * TEXTS]
    shares = F.normalize(own * (own >= 0), dim=1)
    local = (shares[:, :, None] * patch).sum(dim=1)

    labels = torch.arange(len(flat))

    def weighed(vectors: Tensor, targets: Tensor) -> Tensor:
        logits = (scale * vectors @ flat.T).repeat_interleave(TEXTS, dim=0)
        return (
            F.cross_entropy(logits[targets], labels[targets], reduction="none").mul(weights[targets]).sum()
            / weights[targets].sum()
        )

    to_images = F.cross_entropy((scale * flat @ image.T)[counted], (labels // TEXTS)[counted])
    return (weighed(image, counted) + to_images) / 2 + 0.7 * weighed(local, counted & (labels % TEXTS > 0))


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
