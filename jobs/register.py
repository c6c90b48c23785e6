"""Register an evaluated model: the same as `dermray register`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.register import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
