"""What each part of MAKE brings: `python benchmarks/make_ablation.py [--output DIR] [--images N] [--steps N]`.

Draws the synthetic corpus, prepares it with sub-captions, and trains one tiny CLIP from random weights by each of
`ARMS` and each seed: the same steps of the same global batches, so that every arm has seen the same samples as often;
arms that read several texts of a sample have read more texts. All are scored on the same held-out images. Printed are
the scores' means over the seeds, and the difference from the plain CLIP of the same seed: mean over the seeds, with the
95 % interval of a bootstrap over the images that all of them share (the spread of a training's luck is not in it, so
the difference of each seed stands beside). Everything stays in DIR, where one is given; called again, it goes on where
it was.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dermray import cluster, entry
from dermray.config import ClusterConfig, parse
from dermray.corpus import synthetic
from dermray.evaluate import compare, suite
from dermray.evaluate.report import Report
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import Distribution
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig
from dermray.train.pretrain import pretrain
from dermray.train.settings import PretrainConfig

SUB_CAPTIONS = 4
BATCH_SIZE = 64
BOOTSTRAP = 1000
MAKE = ["objective.kind=make", f"objective.sub_captions={SUB_CAPTIONS}"]
WITHOUT_WEIGHTS, WITHOUT_PATCHES = "objective.weights=false", "objective.lambda_s=0"
# Every arm is the one before it and one thing more, but for the last, which is the released code's reading of all but
# the soft targets.
BASELINE = "CLIP, raw caption"
ARMS = {
    BASELINE: ["data.captions.raw=1.0"],
    "CLIP, any of the texts": [f"data.captions.{name}=1.0" for name in ("raw", "ontology", "concept", "sub")],
    "+ all texts at once": [*MAKE, WITHOUT_WEIGHTS, WITHOUT_PATCHES],
    "+ patches": [*MAKE, WITHOUT_WEIGHTS],
    "+ weights": MAKE,
    "+ soft targets": [*MAKE, "objective.soft_targets=true"],
    "as released, without soft targets": [*MAKE, "objective.mode=released"],
}
SCORES = {
    "zero-shot accuracy": ("zero_shot", "accuracy"),
    "concept AUROC": ("concepts", "mean_auroc"),
    "image to text R@10": ("retrieval", "image_to_text_R@10"),
}


def main() -> int:
    """Train and score what the folder lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where everything stays; empty: nowhere")
    parser.add_argument("--images", type=int, default=1600, help="drawn, of which 35 in 100 are scored")
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH_SIZE} samples, each training")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as name:
        output = asked.output or Path(name)
        corpus = prepared(output, asked.images)
        for seed in range(asked.seeds):
            for number, keys in enumerate(ARMS.values()):
                score(output / f"arm-{number}-seed-{seed}", corpus, keys, asked.steps, seed)
        print_table(output, asked.seeds)
    return 0


def prepared(output: Path, num_images: int) -> Path:
    """The corpus, where it is not there yet."""
    corpus = output / "corpus"
    cluster.connect(ClusterConfig())
    if not (corpus / "manifest.json").exists():
        synthetic.write_corpus(output / "raw", num_images=num_images, seed=0)
        keys = [
            "source=derm1m", f"input={output / 'raw'}", f"output={corpus}", "split.val=0.35", "image_size=96",
            "rows_per_shard=256", "row_group_size=32", f"sub_captions={SUB_CAPTIONS}",
        ]  # fmt: skip
        prepare(parse(PrepareConfig, keys))
    return corpus


def score(folder: Path, corpus: Path, arm: list[str], num_steps: int, seed: int) -> None:
    """Train by one arm and evaluate on the held-out images, where that is not done."""
    if (folder / "report" / "report.json").exists():
        return
    began = time.perf_counter()
    keys = [
        "model=dermray_tiny", f"corpus={corpus}", f"output={folder / 'run'}", f"seed={seed}", "num_workers=1",
        f"train.global_batch_size={BATCH_SIZE}", f"train.max_steps={num_steps}", "train.epochs=1000",
        "data.crop_scale=[0.5, 1.0]", "data.horizontal_flip=0.5", "optim.lr=1.0e-3", "optim.warmup_steps=20", *arm,
    ]  # fmt: skip
    trained = pretrain(parse(PretrainConfig, keys), on_record=lambda record: None)
    took = time.perf_counter() - began
    config = parse(
        EvaluateConfig,
        [
            f"model={trained.model_uri}", f"corpus={corpus}", f"output={folder / 'report'}",
            f"tasks=[{', '.join(task for task, _ in SCORES.values())}]", "bootstrap=0",
        ],
    )  # fmt: skip
    report = suite.evaluate(config)
    assert isinstance(report, Report)
    report.save(config.output)
    print(f"{folder.name}: trained in {took:.0f} s, all in {time.perf_counter() - began:.0f} s", flush=True)


def print_table(output: Path, num_seeds: int) -> None:
    """A Markdown table: an arm a row, and of each score the mean and the paired difference from the first arm."""
    found = {
        (number, seed): scores(output / f"arm-{number}-seed-{seed}" / "report")
        for number in range(len(ARMS))
        for seed in range(num_seeds)
    }
    print(f"| arm | {' | '.join(SCORES)} |\n|{'---|' * (1 + len(SCORES))}")
    for number, arm in enumerate(ARMS):
        cells = []
        for name in SCORES:
            mine = [found[number, seed][name] for seed in range(num_seeds)]
            cell = f"{statistics.mean(one.value for one in mine):.3f}"
            if number:
                apart = [one.minus(found[0, seed][name]) for seed, one in enumerate(mine)]
                each = ", ".join(f"{one.value:+.3f}" for one in apart)
                mean = Distribution(
                    float(np.mean([one.value for one in apart])), np.mean([one.resampled for one in apart], axis=0)
                ).metric()
                cell += f"; {mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}] ({each})"
            cells.append(cell)
        print(f"| {arm} | {' | '.join(cells)} |")


def scores(report: Path) -> dict[str, Any]:
    """Of `SCORES` on the images and on resamples, the same for every report."""
    document = compare.read_report(str(report))
    held = {}
    for name, (task, metric) in SCORES.items():
        predictions, _ = compare.load(str(report), document, task)
        held[name] = compare.distributions(predictions, bootstrap=BOOTSTRAP, seed=0)[metric]
    return held


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
