"""Walk a chain of lineage: the same as `dermray lineage`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.lineage import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
