"""What nobody should read in what a healthy run prints, Ray's and MLflow's lines too; colours neither, into a pipe."""

from __future__ import annotations

import re

import pytest

ALARMING = re.compile(r"error|failed|traceback|\x1b\[", re.IGNORECASE)


def alarming(printed: pytest.CaptureFixture[str] | str) -> list[str]:
    """Lines that alarm in a text, or among all that was printed since the last look."""
    if not isinstance(printed, str):
        since = printed.readouterr()
        printed = since.out + since.err
    return [line for line in printed.splitlines() if ALARMING.search(line)]
