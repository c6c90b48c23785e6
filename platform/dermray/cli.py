"""The command `dermray NAME key=value …`: every job by its name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from dermray import __version__, commands, entry
from dermray.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is its own, and 2 for a name that is none.

    Args:
        argv: its name and its arguments; None: those of this process.
    """
    return entry.run_job(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help_text())
        return 0
    if arguments[0] == "--version":
        print(f"dermray {__version__}")
        return 0
    name = arguments[0].replace("-", "_")
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no command {arguments[0]!r}; {meant}`dermray --help` lists them")
    # What a usage line and the run's source in MLflow call it.
    sys.argv[0] = f"dermray {name}"
    return int(importlib.import_module(f"{commands.__name__}.{name}").main(arguments[1:]))


def names() -> list[str]:
    """The commands there are."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def _help_text() -> str:
    width = max(map(len, names())) + 2
    lines = ["usage: dermray NAME [--config FILE.yaml] [key=value ...] [--print-config] [--help]", ""]
    lines += [f"  {name:<{width}}{_summary(name)}" for name in names()]
    return "\n".join([*lines, "", "`dermray NAME --help` says what its keys are."])


def _summary(name: str) -> str:
    """The first sentence of a command's own text, read without importing what the command needs."""
    text = Path(commands.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0].partition(": `")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
