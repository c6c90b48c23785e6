"""Embed a prepared corpus: `python jobs/embed.py model=URI corpus=URI output=URI`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dermray import cluster, entry, storage
from dermray.config import load
from dermray.corpus.manifest import Manifest
from dermray.index.settings import EmbedConfig


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
    """Embed under an MLflow run and say what came of it."""
    from dermray import tracking

    manifest = Manifest.load(config.corpus)
    model = tracking.resolve_model(config.model, config.tracking)
    cluster.connect(config.cluster)
    from dermray.index.embed import embed

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
    if done.failures:
        print(f"left out: {', '.join(f'{count} {reason}' for reason, count in done.failures.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
