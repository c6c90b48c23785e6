"""Set several evaluations side by side: the same as `dermray compare`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.compare import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
