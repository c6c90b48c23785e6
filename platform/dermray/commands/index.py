"""Index embeddings for search: `python jobs/index.py embeddings=URI output=URI`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dermray import entry, ledger, storage
from dermray.config import load
from dermray.corpus.accounts import told_in_words
from dermray.vectors.index.settings import IndexConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        IndexConfig,
        argv,
        prog="jobs/index.py",
        description="Make the index behind /v1/search from what jobs/embed.py wrote.",
    )
    return run(config)


def run(config: IndexConfig) -> int:
    """Index inside a claim of the output: a second run is refused before MLflow knows of it."""
    entry.begin("index", f"reading {config.embeddings}")
    with ledger.claim(config.output, wait_s=config.wait_for_output_s):
        return _run(config)


def _run(config: IndexConfig) -> int:
    """Index under an MLflow run and say what came of it."""
    from dermray import tracking
    from dermray.vectors.index.vectors import build

    name = config.run_name or f"index {storage.name_of(config.embeddings)}"
    with tracking.run(config.tracking, kind="index", name=name, resolved=config) as current:
        started = time.monotonic()
        done = build(config.embeddings, config.output, exact_below=config.exact_below, wait_s=config.wait_for_output_s)
        seconds = time.monotonic() - started
        current.set_tags({"model_digest": done.maker.model_digest, "index_digest": done.digest})
        current.log_metrics({"images": done.images.num_vectors, "recall_at_10": done.images.recall_at_10})
    for kind, side in (("images", done.images), ("captions", done.texts)):
        if side is not None:
            print(f"{side.num_vectors:,} {kind}: {side.method}, recall@10 {side.recall_at_10:.3f}")
    if done.samples:
        print(f"indexed: {told_in_words(done.samples)}")
    print(f"index of {seconds:.0f} s: {config.output}")
    return 0
