"""Search for a better recipe: the same as `dermray sweep`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.sweep import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
