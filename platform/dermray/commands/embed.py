"""Embed a prepared corpus: `python jobs/embed.py model=URI corpus=URI output=URI`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dermray import cluster, entry, ledger, storage
from dermray.config import load
from dermray.corpus.accounts import told_in_words
from dermray.corpus.manifest import Manifest
from dermray.vectors.index.settings import EmbedConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        EmbedConfig,
        argv,
        prog="jobs/embed.py",
        description="Write the vectors of a prepared corpus as Parquet with Ray Data. The same command again goes on.",
    )
    return run(config)


def run(config: EmbedConfig) -> int:
    """Embed inside a claim of the output: a second run is refused before Ray or MLflow know of it."""
    entry.begin("embed", "loading MLflow and the model's settings")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: EmbedConfig) -> int:
    """Embed under an MLflow run and say what came of it."""
    from dermray import tracking
    from dermray.vectors.index.embed import embed

    manifest = Manifest.load(config.corpus)
    for split in config.splits or ():
        manifest.select(split)
    model = tracking.resolve_model(config.model, config.tracking)
    cluster.connect(config.cluster)
    name = config.run_name or f"embed {storage.name_of(config.corpus)} with {model.name}"
    with tracking.run(config.tracking, kind="embed", name=name, resolved=config) as current:
        current.log_corpus(config.corpus, manifest, context="embed")
        started = time.monotonic()
        done = embed(config, model.folder_uri, say=lambda line: print(line, flush=True))
        seconds = time.monotonic() - started
        current.set_tags({"model_digest": done.maker.model_digest, "embeddings_digest": done.digest})
        current.log_metrics(
            {"images": done.num_images, "texts": done.num_texts, "failed_images": sum(done.failures.values())}
        )
    print(f"embedded {done.num_images:,} images and {done.num_texts:,} captions in {seconds:.0f} s: {config.output}")
    if done.samples:
        print(f"embedded: {told_in_words(done.samples)}")
    return 0
