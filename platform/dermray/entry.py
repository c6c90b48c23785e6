"""What every entry point does around its work: exit codes, one-line errors, a clean end on Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dermray.errors import DermRayError, StoppedError


def run_job(main: Callable[[], int]) -> int:
    """Run an entry point's `main`; a `DermRayError` becomes one line on stderr and its exit code."""
    try:
        return main()
    except StoppedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except DermRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
