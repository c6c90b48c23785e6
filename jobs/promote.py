"""Give an alias to a better model: the same as `dermray promote`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.promote import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
