"""Draw the embedded synthetic corpus in Derm1M's raw layout: the same as `dermray synthesize`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.synthesize import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
