"""Export a prepared corpus: the same as `dermray export`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.export import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
