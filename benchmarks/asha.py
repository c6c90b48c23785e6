"""What successive halving saves: `python benchmarks/asha.py [--folder FOLDER] [--trials N] [--replay-only]`.

Random search over learning rate, batch size and crop scale of the demo recipe, shrunk (a smaller model, fewer images,
one worker), with every trial trained to its end; then the same trials with ASHA. Printed are the best of each with its
95 % interval, and the share of training samples that ASHA took. A trial trains the same whatever the others do, so that
the full curves also tell what ASHA would have done had the trials come in another order: Tune's own scheduler is asked
1,000 times.

Takes some 25 minutes on 2 cores. With --folder a call that was interrupted goes on, as every sweep does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import TrialScheduler
from scipy.stats import binomtest

from dermray import cluster, entry, storage
from dermray.config import ClusterConfig, parse
from dermray.tuning.settings import SweepConfig
from dermray.tuning.sweep import scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dermray.commands import sweep as job
from tests.corpora import write_model

ROOT = Path(__file__).resolve().parent.parent
NUM_TRIALS = 16
NUM_IMAGES = 960
VALIDATION_SHARE = 0.25
VALIDATION_SAMPLES = 240
NUM_ORDERS = 1000
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SPACE = (
    "space.optim.lr={kind: loguniform, low: 1.0e-4, high: 1.0e-2}",
    "space.train.global_batch_size={kind: choice, values: [16, 32]}",
    "space.data.crop_scale={kind: choice, values: [[0.2, 1.0], [0.5, 1.0], [0.9, 1.0]]}",
)
OVERRIDES = (
    *("overrides.num_workers=1", "overrides.train.epochs=8", "overrides.optim.warmup_steps=10"),
    *("overrides.train.keep_checkpoints=1", "overrides.train.checkpoint_every_steps=40"),
    f"overrides.validation.max_samples={VALIDATION_SAMPLES}",
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, help="keep everything there; the same folder again goes on")
    arguments.add_argument("--trials", type=int, default=NUM_TRIALS, help="number of trials")
    arguments.add_argument("--replay-only", action="store_true", help="leave out the second sweep")
    chosen = arguments.parse_args()
    if chosen.folder is not None:
        compare(chosen.folder, chosen.trials, chosen.replay_only)
    else:
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            compare(Path(folder), chosen.trials, chosen.replay_only)
    return 0


def compare(folder: Path, num_trials: int, replay_only: bool) -> None:
    """Both sweeps, and what they say."""
    write_corpus(folder)
    if not storage.exists(folder / "model" / "open_clip_config.json"):
        write_model(folder / "model", model_cfg=MODEL_CFG)
    cluster.connect(ClusterConfig())
    config = configured(folder, "halved", num_trials)
    full = run(configured(folder, "full", num_trials, "scheduler.kind=none"))
    print(f"{num_trials} trials of {config.objective}, seed {config.seed}")
    say("random search, all in full", full)
    if not replay_only:
        say("the same with ASHA", run(config))
    replay_orders(config, full)


def say(name: str, document: dict[str, Any]) -> None:
    """The best of a sweep and what it cost."""
    low, high = interval(document["best_objective"])
    print(
        f"{name}: best {document['best_objective']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"{document['samples_trained']:,.0f} samples, {document['samples_share']:.1%} of all in full, "
        f"{document['trials_stopped']:.0f} stopped"
    )


def write_corpus(folder: Path) -> None:
    """The demo's corpus, smaller, with a larger share to validate on."""
    if storage.exists(folder / "corpus" / "manifest.json"):
        return
    run_job("jobs/synthesize.py", f"output={folder / 'raw'}", f"num_images={NUM_IMAGES}")
    run_job(
        *("jobs/prepare.py", "source=derm1m", f"input={folder / 'raw'}", f"output={folder / 'corpus'}"),
        *(f"split.val={VALIDATION_SHARE}", "image_size=96", "rows_per_shard=256", "row_group_size=16"),
        "tracking.enabled=false",
    )


def run_job(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def configured(folder: Path, name: str, num_trials: int, *more: str) -> SweepConfig:
    keys = (f"recipe={ROOT / 'jobs/configs/demo.yaml'}", f"corpus={folder / 'corpus'}", f"output={folder / name}")
    fixed = (f"num_trials={num_trials}", "num_validations=16", "max_concurrent_trials=2", f"run_name={name}")
    more = (*more, f"tracking.uri=sqlite:///{folder.absolute()}/mlflow.db", f"tracking.spool={folder / 'spool'}")
    model = f"overrides.model={folder / 'model'}"
    return parse(SweepConfig, [*keys, *SPACE, *OVERRIDES, model, *fixed, *more])


def run(config: SweepConfig) -> dict[str, Any]:
    """The sweep's `trials.json`."""
    job.run(config)
    return storage.read_json(storage.join(config.output, "trials.json"))


def interval(accuracy: float) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy over the validation samples."""
    found = binomtest(round(accuracy * VALIDATION_SAMPLES), VALIDATION_SAMPLES).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def replay_orders(config: SweepConfig, full: dict[str, Any]) -> None:
    """What ASHA would find, and cost, with the trials one at a time: in their own order and in random ones."""
    named = sorted(full["trials"], key=lambda trial: trial["name"])
    curves = [[(p["samples"], p[config.objective]) for p in trial["curve"]] for trial in named]
    best, share = replay_all(config, curves)
    print(f"one at a time in their own order: ASHA's best {best:.4f}, samples {share:.1%} of all in full")
    low, _ = interval(full["best_objective"])
    random = np.random.default_rng(0)
    ends = [replay_all(config, [curves[n] for n in random.permutation(len(curves))]) for _ in range(NUM_ORDERS)]
    shares = [share for _, share in ends]
    reached = sum(best >= low for best, _ in ends)
    same = sum(best == full["best_objective"] for best, _ in ends)
    print(
        f"{NUM_ORDERS:,} orders of the same trials: ASHA's best is within the interval of the best in {reached:,} and "
        f"that very trial in {same:,}; samples {statistics.median(shares):.1%} of all in full in the median "
        f"({np.quantile(shares, 0.05):.1%} to {np.quantile(shares, 0.95):.1%} in nine of ten)"
    )


def replay_all(config: SweepConfig, curves: list[list[tuple[int, float]]]) -> tuple[float, float]:
    """The best figure of those that come to their end, and the share of samples."""
    asha = scheduler(config)
    asha.set_search_properties(config.objective, config.mode)
    ends = [replay(asha, config, f"{number}", curve) for number, curve in enumerate(curves)]
    spent = sum(samples for samples, _, _ in ends) / sum(curve[-1][0] for curve in curves)
    return max(value for _, value, finished in ends if finished), spent


def replay(
    asha: TrialScheduler, config: SweepConfig, name: str, curve: list[tuple[int, float]]
) -> tuple[int, float, bool]:
    """Samples, figure and whether a trial came to its end, told to the scheduler one validation after the other."""
    trial: Any = SimpleNamespace(trial_id=name)
    asha.on_trial_add(None, trial)
    for number, (samples, value) in enumerate(curve, 1):
        result = {"validation": number, config.objective: value}
        last = number == len(curve)
        if not last and asha.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            return samples, value, False
    asha.on_trial_complete(None, trial, result)
    return samples, value, True


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
