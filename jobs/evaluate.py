"""Score a model on a prepared corpus, a published benchmark or a table of one's own: the same as `dermray evaluate`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
