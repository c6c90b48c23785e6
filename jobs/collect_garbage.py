"""Find and remove checkpoints and scratch that nothing needs: the same as `dermray collect_garbage`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.collect_garbage import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
