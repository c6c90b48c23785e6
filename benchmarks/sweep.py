"""What Ray Tune costs: `python benchmarks/sweep.py`, the trials of a sweep over the same trainings by hand.

The same trainings (a tiny model on drawn images, the same CPUs a worker) run one after the other in one Ray cluster: as
a sweep without early stopping, and by calls of `pretrain`. Both validate as often. Which side begins changes by round;
`--round N` runs one of them alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from dermray import cluster, entry
from dermray.config import ClusterConfig, parse
from dermray.ingest.corpora import Corpora
from dermray.tuning.plan import plan_trials, share_cluster
from dermray.tuning.settings import SweepConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.corpora import write_model, write_prepared_corpus

NUM_TRIALS = 2
NUM_ROUNDS = 2
RECIPE = {
    "train": {"epochs": 200, "global_batch_size": 16, "log_every_steps": 50, "max_failures": 0},
    "optim": {"warmup_steps": 5},
    "validation": {"max_samples": 24},
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, default=NUM_TRIALS, help="trials of the sweep")
    arguments.add_argument("--round", type=int, help="only this round, from 0; even ones begin with the sweep")
    chosen = arguments.parse_args()
    rounds = range(NUM_ROUNDS) if chosen.round is None else [chosen.round]
    measure(chosen.trials, rounds)
    return 0


def measure(num_trials: int, rounds: Sequence[int]) -> None:
    """Print the ratio of each round and their median."""
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as name:
        folder = Path(name)
        write_prepared_corpus(folder / "corpus", {"train": 64, "val": 24})
        model = write_model(folder / "model")
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), **RECIPE}))
        cluster.connect(ClusterConfig())
        ratios = []
        for number in rounds:
            sides = {}
            for side in ("sweep", "by hand") if number % 2 == 0 else ("by hand", "sweep"):
                config = sweep_config(folder, f"{side} {number}", num_trials)
                started = time.perf_counter()
                as_sweep(config) if side == "sweep" else by_hand(config)
                sides[side] = time.perf_counter() - started
            ratios.append(sides["sweep"] / sides["by hand"])
            figures = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in sorted(sides.items()))
            print(f"{num_trials} trials: {figures}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"sweep over by hand: {statistics.median(ratios):.2f} (median of {len(ratios)})")


def sweep_config(folder: Path, output: str, num_trials: int) -> SweepConfig:
    arguments = {
        "recipe": folder / "recipe.yaml",
        "corpus": folder / "corpus",
        "output": folder / output,
        "space.optim.lr": "{kind: loguniform, low: 1.0e-4, high: 1.0e-3}",
        "num_trials": num_trials,
        "num_validations": 2,
        "scheduler.kind": "none",
        "tracking.enabled": "false",
    }
    return parse(SweepConfig, [f"{key}={value}" for key, value in arguments.items()])


def as_sweep(config: SweepConfig) -> None:
    from dermray.tuning.sweep import checked, sweep

    trials = checked(config, plan_trials(config, Corpora.load(config.corpus_uris)))
    sweep(config, trials, parent_key=None, say=lambda line: None)


def by_hand(config: SweepConfig) -> None:
    from dermray.train.pretrain import pretrain

    trials = plan_trials(config, Corpora.load(config.corpus_uris))
    _, trials = share_cluster(config, trials, num_cpus=cluster.num_cpus(), num_gpus=cluster.num_gpus())
    for trial in trials:
        pretrain(trial.config, on_record=lambda record: None)


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
