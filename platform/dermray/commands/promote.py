"""Give an alias to a better model: `python jobs/promote.py name=dermray candidate=4 [--dry-run]`; `roll_back=true`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from dermray.config import Config, TrackingConfig, load

if TYPE_CHECKING:
    from dermray.release import promotion


# Keys that say which version an alias goes to, or whether it may.
DECIDE = {"candidate", "margin", "metrics"}


class PromoteConfig(Config):
    """Everything `jobs/promote.py` can be told."""

    name: str = Field("dermray", description="name of the registered model")
    candidate: str = Field("", description="version that shall have the alias: its number or another alias of it")
    alias: str = Field("champion", description="alias to give")
    margin: float = Field(
        0.01, ge=0, description="how much worse a score may be at the worse end of its interval; of ranks a share"
    )
    metrics: tuple[str, ...] = Field((), description="TASK.METRIC that decide; empty: all that the champion has")
    commercial_aliases: tuple[str, ...] = Field(
        ("production",), description="aliases that only models get whose data allow commercial use"
    )
    allow_non_commercial: bool = Field(False, description="true: such an alias for any model; the audit record says so")
    roll_back: bool = Field(False, description="true: give the alias back to the version that had it before")
    dry_run: bool = Field(False, description="true, or --dry-run: say what would happen, and do nothing")
    run_name: str | None = Field(None, description="name of the run in MLflow; empty: from model and alias")
    tracking: TrackingConfig = TrackingConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`. The exit code is 1 when the alias stays where it is."""
    arguments = ["dry_run=true" if one == "--dry-run" else one for one in (sys.argv[1:] if argv is None else argv)]
    config = load(
        PromoteConfig,
        arguments,
        prog="jobs/promote.py",
        description="Give an alias to a candidate when no score is worse than the champion's by more than a margin.",
    )
    from dermray import tracking
    from dermray.printable import printable
    from dermray.release import promotion

    move = _move(config)
    print("\n".join(printable(line) for line in move.lines()))
    if config.dry_run:
        print("dry run: nothing was done")
        return int(not move.is_allowed)
    name = config.run_name or f"promote {config.name}@{config.alias}"
    with tracking.run(config.tracking, kind="promote", name=name, resolved=config) as current:
        promotion.carry_out(current, move)
    print(f"models:/{move.name}@{move.alias} is version {move.after}")
    return 0


def _move(config: PromoteConfig) -> promotion.Move:
    from dermray.errors import ConfigError
    from dermray.release import promotion

    if config.roll_back:
        unused = sorted(config.model_fields_set & DECIDE)
        if unused:
            raise ConfigError(
                f"{', '.join(unused)}: no effect with roll_back=true, which gives {config.alias} back to the version "
                "that had it before; leave out one or the other"
            )
        return promotion.roll_back(config.tracking, name=config.name, alias=config.alias)
    if not config.candidate:
        raise ConfigError("candidate is required: the number of a version, or an alias of it")
    return promotion.plan(
        config.tracking,
        name=config.name,
        candidate=config.candidate,
        alias=config.alias,
        margin=config.margin,
        metrics=config.metrics,
        commercial_aliases=config.commercial_aliases,
        allow_non_commercial=config.allow_non_commercial,
    )
