"""`python -m dermray NAME key=value …`: the command `dermray` where its script is not in the path."""

import sys

from dermray.cli import main

if __name__ == "__main__":
    sys.exit(main())
