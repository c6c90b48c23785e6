"""Time and peak memory of the bootstrap: `python benchmarks/bootstrap.py [num_samples num_classes num_resamples]`.

All eight classification metrics with their intervals, and the paired comparison of two models, on 10,000 x 113
probabilities with 1,000 resamples: 10 s and 1 GB on 2 cores are the goal. The plain way beside it is scikit-learn's
functions in a loop over resamples, timed on one of them. Each measurement is a process of its own; memory is what
comes on top of the probabilities.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
from sklearn import metrics as reference

from dermray import entry
from dermray.evaluate.compare import compare
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.statistics.bootstrap import resample_weights
from dermray.evaluate.statistics.metrics import classification

SIZE = (10_000, 113, 1_000)
ROUNDS = 3
LOOPED_RESAMPLES = 1
SAMPLE_EVERY_S = 0.005
METHODS = ("classification", "paired comparison", "scikit-learn loop")


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:6]))))
        return 0
    num_samples, num_classes, num_resamples = [int(one) for one in sys.argv[1:4]] or SIZE
    runs = [
        {method: in_fresh_process(method, num_samples, num_classes, num_resamples) for method in METHODS}
        for _ in range(ROUNDS)
    ]
    print(f"{num_samples:,} x {num_classes} probabilities, {num_resamples:,} resamples, median of {ROUNDS}")
    plain = statistics.median(run["scikit-learn loop"]["seconds"] for run in runs)
    for method in METHODS:
        seconds = statistics.median(run[method]["seconds"] for run in runs)
        peak = statistics.median(run[method]["peak_bytes"] for run in runs)
        ratio = f"{plain / seconds:8.0f} times faster than the loop" if method == METHODS[0] else ""
        print(f"{method:<18} {seconds:9.2f} s {peak / 1e9:7.3f} GB {ratio}".rstrip(), flush=True)
    return 0


def in_fresh_process(method: str, *size: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--measure", method, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(method: str, num_samples: int, num_classes: int, num_resamples: int) -> dict[str, float]:
    first, labels = draw(0, num_samples, num_classes)
    second, _ = draw(1, num_samples, num_classes)
    ids = [str(number) for number in range(num_samples)]
    names = tuple(map(str, range(num_classes)))
    # What is imported or set up at the first call is not the bootstrap's.
    classification(first[:500], labels[:500], bootstrap=2)
    with PeakMemory() as memory:
        began = time.perf_counter()
        if method == "classification":
            classification(first, labels, bootstrap=num_resamples)
        elif method == "paired comparison":
            pair = [ClassPredictions(ids, labels, one.astype(np.float32), names) for one in (first, second)]
            compare(pair[0], pair[1], bootstrap=num_resamples)
        else:
            loop(first, labels)
        seconds = time.perf_counter() - began
    if method == "scikit-learn loop":
        seconds *= num_resamples / LOOPED_RESAMPLES
    return {"seconds": seconds, "peak_bytes": memory.peak_bytes}


def draw(seed: int, num_samples: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something about labels of unequal classes, the labels the same for every seed."""
    shares = np.random.default_rng(0).dirichlet(np.full(num_classes, 2.0))
    labels = np.random.default_rng(0).choice(num_classes, size=num_samples, p=shares)
    labels[:num_classes] = np.arange(num_classes)
    logits = np.random.default_rng([1, seed]).normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), labels] += 1.5
    scores = np.exp(logits)
    return scores / scores.sum(axis=1, keepdims=True), labels


def loop(scores: np.ndarray, labels: np.ndarray) -> None:
    classes = range(scores.shape[1])
    (weights,) = resample_weights(labels, LOOPED_RESAMPLES, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for column in weights.T:
            rows = np.repeat(np.arange(len(labels)), column.astype(int))
            truth, drawn = labels[rows], scores[rows]
            predictions = drawn.argmax(axis=1)
            reference.accuracy_score(truth, predictions)
            reference.top_k_accuracy_score(truth, drawn, k=5, labels=classes)
            reference.balanced_accuracy_score(truth, predictions)
            reference.roc_auc_score(truth, drawn, multi_class="ovr")
            reference.roc_auc_score(truth, drawn, multi_class="ovo")
            reference.f1_score(truth, predictions, average="weighted")
            reference.f1_score(truth, predictions, average="macro")
            reference.cohen_kappa_score(truth, predictions, weights="quadratic")


class PeakMemory:
    """Resident memory on top of what there was, looked at every few milliseconds."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss - self._before)


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
