"""Deliver what runs have said while MLflow was out of reach: `python jobs/deliver.py tracking.uri=URI`."""

from __future__ import annotations

from collections.abc import Sequence

from dermray.config import Config, TrackingConfig, load


class DeliverConfig(Config):
    """Everything `jobs/deliver.py` can be told."""

    tracking: TrackingConfig = TrackingConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        DeliverConfig,
        argv,
        prog="jobs/deliver.py",
        description="Deliver to MLflow what finished or killed runs have left in the spool of this machine.",
    )
    from dermray import tracking

    done = tracking.deliver_left_over(config.tracking)
    print(f"delivered {done.num_delivered} spool files from {done.folder}; {done.num_kept} stay")
    return 0
