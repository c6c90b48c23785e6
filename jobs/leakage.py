"""Find evaluation images in a training corpus: the same as `dermray leakage`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.leakage import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
