"""Embed a prepared corpus: the same as `dermray embed`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.embed import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
