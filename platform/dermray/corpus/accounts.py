"""Rows in = samples + rows told: the one place where this is checked, for every reader and job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dermray.printable import printable

# Why samples of a corpus are in nothing that is made of some of its splits.
OTHER_SPLIT = "in another split"


def require_balance(what: str, rows_in: int, rows_used: int, told: Mapping[str, int]) -> dict[str, Any]:
    """Every row is used, or left out for a reason that the report tells.

    Args:
        what: whose rows they are, for the message.
        rows_in: rows that were given, counted where they were met and not as the sum of what became of them.
        rows_used: rows that are in samples, or were scored.
        told: rows left out, by reason.

    Returns:
        The figures for a report, JSON-serialisable: `in`, `used`, and `told`, the reasons that concern any row.

    Raises:
        AssertionError: rows are unaccounted for, or counted twice: a fault of ours, never of the data.
    """
    left_out = sum(told.values())
    reasons = {reason: count for reason, count in told.items() if count}
    if rows_used + left_out != rows_in or min(told.values(), default=0) < 0:
        shown = _in_words(reasons) or "none"
        raise AssertionError(f"{what}: {rows_in:,} rows in, {rows_used:,} used, {left_out:,} told ({shown})")
    return {"in": rows_in, "used": rows_used, "told": reasons}


def told_in_words(figures: Mapping[str, Any], unit: str = "samples") -> str:
    """The figures of `require_balance` in a line: `12 of 15 samples; left out: truncated 3`."""
    reasons = _in_words(figures["told"])
    return f"{figures['used']:,} of {figures['in']:,} {unit}" + (f"; left out: {reasons}" if reasons else "")


def _in_words(reasons: Mapping[str, int]) -> str:
    # Reasons that a record names are its author's words.
    return ", ".join(f"{printable(str(reason))} {count:,}" for reason, count in reasons.items())
