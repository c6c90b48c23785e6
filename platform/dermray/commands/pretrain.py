"""Pretrain a vision-language model on a prepared corpus: `python jobs/pretrain.py --config FILE key=value …`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from dermray import cluster, entry, ledger, storage
from dermray.config import load
from dermray.train.settings import PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        PretrainConfig,
        argv,
        prog="jobs/pretrain.py",
        description="Pretrain a model on a prepared corpus with Ray Train. The same command again resumes.",
    )
    return run(config)


def run(config: PretrainConfig) -> int:
    """Pretrain inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("pretrain", "loading torch and Ray Train")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: PretrainConfig) -> int:
    """Pretrain under an MLflow run; the run id is kept in the output, so a restart continues it."""
    from dermray import tracking
    from dermray.corpus import branches
    from dermray.ingest.corpora import Corpora
    from dermray.train import toy
    from dermray.train.pretrain import check, pretrain, require_room, samples_of_an_epoch, without_effect
    from dermray.train.progress import ProgressPrinter, StepRecord

    config = toy.shrunk(config)
    told: dict[str, str] = {}
    if check(config) is None:
        entry.warn(without_effect(config))
        for uri in config.corpus_uris:
            entry.warn(branches.told_of_old(uri))
        told["samples_of_an_epoch"] = samples_of_an_epoch(config)
        print(told["samples_of_an_epoch"], flush=True)
        cluster.connect(config.cluster)
        require_room(config)
    corpora = Corpora.load(config.corpus_uris)
    printer = ProgressPrinter()
    name = config.run_name or f"pretrain {config.model} {storage.name_of(config.output)}"
    with tracking.run(
        config.tracking,
        kind="pretrain",
        name=name,
        resolved=config,
        state_uri=storage.join(config.output, "mlflow.json"),
    ) as current:
        for uri, manifest in zip(corpora.uris, corpora.manifests, strict=True):
            current.log_corpus(uri, manifest, context="training")
        current.set_tags(told)

        def on_record(record: StepRecord) -> None:
            printer(record)
            current.log_metrics(record.metrics, step=record.step)

        result = pretrain(
            config,
            on_record=on_record,
            on_notice=functools.partial(print, flush=True),
            provenance=tracking.provenance(current, *corpora.manifests),
        )
        current.log_artifact("output", "model", result.model_uri, result.weights_sha256)
        current.set_tags(
            {"model_uri": result.model_uri, "weights_sha256": result.weights_sha256, "verdict": printer.verdict}
        )
    if result.resumed_step:
        print(f"resumed at step {result.resumed_step}")
    print(f"finished {result.num_steps} steps, loss {result.metrics['loss']:.4f}")
    print(f"model: {result.model_uri} (weights sha256 {result.weights_sha256[:12]})")
    return 0
