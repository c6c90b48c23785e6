"""Deliver what runs have said while MLflow was out of reach: the same as `dermray deliver`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.deliver import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
