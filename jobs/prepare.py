"""Prepare a corpus for training: the same as `dermray prepare`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.prepare import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
