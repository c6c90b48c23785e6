"""Find and remove checkpoints and scratch that nothing needs: `python jobs/collect_garbage.py roots=[URI,URI]`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import Field

from dermray import reporting
from dermray.config import Config, TrackingConfig, load
from dermray.printable import printable

REMOVED_FILE = "removed.json"


class CollectGarbageConfig(Config):
    """Everything `jobs/collect_garbage.py` can be told."""

    roots: tuple[str, ...] = Field(
        min_length=1, description="URIs of folders to look under: outputs of trainings, sweeps"
    )
    min_age_days: float = Field(7.0, ge=0, description="what was written later is kept")
    dry_run: bool = Field(True, description="false: remove what is listed as garbage")
    run_name: str | None = Field(None, description="name of the run in MLflow; empty: from the roots")
    tracking: TrackingConfig = TrackingConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        CollectGarbageConfig,
        argv,
        prog="jobs/collect_garbage.py",
        description="List checkpoints and scratch files that no alias, running job or lineage needs; removes them only "
        "with dry_run=false.",
    )
    from dermray import tracking
    from dermray.release import garbage

    found = garbage.find(config.tracking, config.roots, min_age_days=config.min_age_days)
    for item in found:
        what = f"{'garbage' if item.is_garbage else 'kept':<8}{reporting.size(item.num_bytes):>10}  {item.uri}"
        print(printable(what + (f": {item.kept_for}" if item.kept_for else "")))
    useless = [item for item in found if item.is_garbage]
    amount = f"{len(useless)} of {len(found)} items, {reporting.size(sum(item.num_bytes for item in useless))}"
    if config.dry_run or not useless:
        print(f"garbage: {amount}" + ("; dry_run=false removes it" if useless else ""))
        return 0
    name = config.run_name or f"collect garbage under {', '.join(config.roots)}"
    with tracking.run(config.tracking, kind="collect_garbage", name=name, resolved=config) as current:
        # Written down before it is done: what is gone can be asked for then.
        current.log_text(json.dumps([item.to_json() for item in useless], indent=2) + "\n", REMOVED_FILE)
        current.connected()
        for item in useless:
            garbage.remove(item)
        current.log_metrics({"removed": len(useless), "removed_bytes": sum(item.num_bytes for item in useless)})
    print(f"removed: {amount}")
    return 0
