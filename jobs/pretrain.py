"""Pretrain a vision-language model on a prepared corpus: the same as `dermray pretrain`."""

from __future__ import annotations

import sys

from dermray import entry
from dermray.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(entry.run_job(main))
