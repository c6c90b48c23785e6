"""Index embeddings for search: the same as `dermray index`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.index import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
