"""The published recipes' training step on one GPU: `python benchmarks/train_step_gpu.py [case …]`.

Cases: `vit_b16` (ViT-B/16 and CLIP's text tower of 77 tokens) and `panderm_pubmed256` (PanDerm-B and PubMedBERT of 256
tokens), at batch 2048 in bf16 autocast, with captions of the published length. Data are excluded: all sides get the
same tensors in page-locked memory, bytes to ours, normalised numbers to theirs. Ours is `Trainer.train_step`, once for
each `SHARE:KEEPS:COMPILE` of `--ours`: the share of blocks that are recomputed in the backward pass, what of them is
kept, and whether blocks are compiled (`train.grad_checkpointing`, `…_keeps`, `train.compile`). Theirs (`--theirs`) is
`train_one_epoch` of `open_clip_train` with `--precision amp_bf16 --grad-checkpointing`, on a copy of the model.

Prints images/s, model FLOP/s and their share of the card's dense bf16 peak (`dermray.train.speed`), the peak of memory,
and how long the first steps took, which compile. `--profile` prints the kernels that one of our steps spends its time
on. `--device cpu` with a small `--batch` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from train_step import PLAIN, Case, OpenClip, our_trainer, synthetic_batch

from dermray import entry, models
from dermray.config import validate
from dermray.ingest.loader import Batch
from dermray.train import numerics, speed
from dermray.train.objectives.contrastive.cost import FlopModel, flop_model
from dermray.train.settings import PretrainConfig

CASES = {
    "vit_b16": Case("ViT-B-16-quickgelu", 2048, 12, 49407, 77, 1.3),
    "panderm_pubmed256": Case("panderm_base_pubmed256", 2048, 12, 30521, 256, 1.35),
}
OURS = ("1:products:true", "1:products:false", "1:nothing:false")
# Captions differ from batch to batch, and with them the shapes that are compiled.
NUM_BATCHES = 3


@dataclass
class Bench:
    """What the sides of a case share.

    Attributes:
        num_tokens: text positions a sample that the last steps went over, their mean.
    """

    case: Case
    device: torch.device
    model: nn.Module
    flops: FlopModel
    batches: list[Batch]
    num_tokens: float = 0.0

    def measure(self, title: str, run: Callable[[int], None]) -> None:
        """Report `run(number of steps)` after it has seen every batch twice."""
        started = time.perf_counter()
        run(2 * NUM_BATCHES)
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        run(self.case.num_steps)
        step_s = (time.perf_counter() - started) / self.case.num_steps
        achieved = self.flops.of_step(self.case.batch_size, self.num_tokens) / step_s
        peak = speed.peak_flops(self.device)
        used = f", MFU {achieved / peak:.1%}" if peak else ""
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.device.type == "cuda" else ""
        print(
            f"{title}: {self.case.batch_size / step_s:,.0f} images/s, {step_s * 1000:,.0f} ms a step, "
            f"{achieved / 1e12:,.0f} TFLOP/s{used}, {self.num_tokens:.0f} tokens{memory}, first {first_s:.0f} s",
            flush=True,
        )


def main() -> int:
    """Measure the cases named on the command line, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], help=", ".join(CASES))
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="SHARE:KEEPS:COMPILE")
    parser.add_argument("--theirs", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing is measured")
        return 0
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name in options.cases:
        bench = prepared(replace(CASES[name], batch_size=options.batch), device)
        for variant in options.ours:
            with forgiving_memory(f"{name}: ours {variant}", device):
                run_ours(f"{name}: ours {variant}", bench, settings(options.batch, variant), options.profile)
        if options.theirs:
            with forgiving_memory(f"{name}: open_clip_train", device):
                run_theirs(f"{name}: open_clip_train", bench)
    return 0


def prepared(case: Case, device: torch.device) -> Bench:
    """Model with random weights on the CPU, and batches."""
    torch.manual_seed(0)
    model = models.create(case.name)[0].train()
    flops = flop_model(model, image_size=PLAIN.size, context_length=case.context_length)
    batches = [synthetic_batch(case, step) for step in range(NUM_BATCHES)]
    if device.type == "cuda":
        batches = [
            replace(batch, arrays={name: array.pin_memory() for name, array in batch.arrays.items()})
            for batch in batches
        ]
    return Bench(case, device, model, flops, batches)


def settings(batch_size: int, variant: str) -> PretrainConfig:
    share, keeps, compiled = variant.split(":")
    train = {
        "global_batch_size": batch_size,
        "grad_checkpointing": float(share),
        "grad_checkpointing_keeps": keeps,
        "compile": compiled == "true",
        "precision": "bf16",
    }
    return validate(PretrainConfig, {"corpus": "c", "output": "o", "train": train})


@contextmanager
def forgiving_memory(title: str, device: torch.device) -> Iterator[None]:
    """What does not fit is said, and the next is tried."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"{title}: does not fit the memory of the card", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_ours(title: str, bench: Bench, config: PretrainConfig, profiled: bool) -> None:
    """On a copy of the model, made ready as a worker does."""
    model = copy.deepcopy(bench.model).to(bench.device)
    numerics.settle(config, bench.device)
    numerics.prepare(model, config.train)
    trainer = our_trainer(model, config, device=bench.device)

    def run(num_steps: int) -> None:
        tokens, loss = [], torch.zeros(())
        for number in range(num_steps):
            loss = trainer.train_step(bench.batches[number % NUM_BATCHES])["loss"].value
            tokens.append(trainer.figures.take()["text_tokens"].value)
        # Waits for the device.
        assert loss.isfinite().item()
        bench.num_tokens = statistics.mean(tokens)

    bench.measure(title, run)
    if profiled:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as events:
            run(1)
        print(events.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=100))


def run_theirs(title: str, bench: Bench) -> None:
    """Their loop over the same batches, normalised before the clock."""
    model = copy.deepcopy(bench.model).to(bench.device)
    model.set_grad_checkpointing()  # type: ignore[operator]
    published = OpenClip(model, bench.case.batch_size, bench.device, "amp_bf16")
    ready = [normalised(batch, bench.device) for batch in bench.batches]

    def run(num_steps: int) -> None:
        published.train([ready[number % NUM_BATCHES] for number in range(num_steps)], num_steps)
        bench.num_tokens = bench.case.context_length
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    bench.measure(title, run)


def normalised(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    pixels = (batch["pixels"].permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.25
    return (pixels.pin_memory() if device.type == "cuda" else pixels), batch["tokens"].long()


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
