"""Search for a better recipe: `python tune/sweep.py --config tune/spaces/demo.yaml corpus=URI output=URI`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dermray import cluster, entry, ledger, storage
from dermray.config import load
from dermray.tuning.settings import SweepConfig

if TYPE_CHECKING:
    from dermray.tuning.publishing import SweepResult


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        SweepConfig,
        argv,
        prog="tune/sweep.py",
        description="Try variations of a recipe with Ray Tune, giving up poor ones early. The same command resumes.",
    )
    return run(config)


def run(config: SweepConfig) -> int:
    """Sweep inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("sweep", "loading torch and Ray Tune, planning the trials")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: SweepConfig) -> int:
    """Sweep under a parent MLflow run; every trial has a nested one."""
    from dermray import tracking
    from dermray.ingest.corpora import Corpora
    from dermray.train import pretrain
    from dermray.tuning import evaluations
    from dermray.tuning.plan import plan_trials
    from dermray.tuning.records import of_earlier_versions
    from dermray.tuning.sweep import checked, sweep

    corpora = Corpora.load(config.corpus_uris)
    entry.warn(config.without_effect())
    # Trials run in other folders, where a default of the current folder would be another store.
    store = config.tracking.model_copy(update={"uri": tracking.tracking_uri(config.tracking)})
    config = config.model_copy(update={"tracking": store})
    begin: Callable[..., SweepResult]
    if config.job == "evaluate":
        scored = evaluations.plan_evaluations(config)
        entry.warn(of_earlier_versions(scored))
        begin = functools.partial(evaluations.sweep, config, scored)
    else:
        trials = checked(config, plan_trials(config, corpora))
        entry.warn(of_earlier_versions(trials))
        entry.warn(dict.fromkeys(line for trial in trials for line in pretrain.without_effect(trial.config)))
        begin = functools.partial(sweep, config, trials)
    cluster.connect(config.cluster)
    subject = storage.name_of(config.recipe) if config.recipe else config.job
    name = config.run_name or f"sweep {subject} {storage.name_of(config.output)}"
    state_uri = storage.join(config.output, "mlflow.json")
    with tracking.run(config.tracking, kind="sweep", name=name, resolved=config, state_uri=state_uri) as current:
        for uri, manifest in zip(corpora.uris, corpora.manifests, strict=True):
            current.log_corpus(uri, manifest, context="training")
        result = begin(parent_key=current.key, say=say)
        current.log_metrics(result.metrics())
        current.log_artifact("output", "recipe", result.best_uri, storage.sha256(result.best_uri))
        current.set_tags({"best_trial": result.best.name})
        for uri in (result.best_uri, result.trials_uri, result.page_uri):
            current.log_text(storage.read_text(uri), storage.name_of(uri))
        current.log_text(result.leaderboard + "\n", "leaderboard.txt")
    say(result.leaderboard)
    say(f"best: {result.best.name} with {result.best.label()}")
    say(f"recipe: {result.best_uri}")
    say(f"trials: {result.trials_uri}")
    say(f"report: {result.page_uri}")
    return 0


def say(line: str) -> None:
    """Print a line at once. A function, and not a partial of `print`: Tune pickles it, and Ray replaces `print`."""
    print(line, flush=True)
