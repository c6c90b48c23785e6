"""Draw the embedded synthetic corpus in Derm1M's raw layout: `python jobs/synthesize.py output=DIR num_images=3000`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from dermray.config import Config, load


class SynthesizeConfig(Config):
    """Everything `jobs/synthesize.py` can be told."""

    output: str = Field(description="local folder for the table, the images and the ontology")
    num_images: int = Field(3000, ge=1, description="images to draw")
    seed: int = Field(0, ge=0, description="same seed, same bytes")
    num_processes: int | None = Field(None, ge=1, description="drawing processes; empty: one a core")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        SynthesizeConfig,
        argv,
        prog="jobs/synthesize.py",
        description="Draw a synthetic dermatology corpus (images, captions, ontology) in the raw layout of Derm1M.",
    )
    from dermray.corpus import synthetic

    summary = synthetic.write_corpus(
        config.output, num_images=config.num_images, seed=config.seed, workers=config.num_processes
    )
    print(
        f"{summary['num_images']} images of {summary['num_conditions']} conditions with {summary['num_concepts']} "
        f"concepts: {summary['table']}"
    )
    return 0
