"""How a capability is found by its name: a folder of ours, an installed package's entry point, or an import path."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def find(name: str, *, package: str, group: str, attribute: str, what: str) -> Any:
    """What a name stands for, imported.

    Args:
        name: of a folder of `package`, of an entry point of `group`, or `package.module:ATTRIBUTE`; in this order.
        package: import path of the package whose folders are the capabilities of our own.
        group: of entry points.
        attribute: what a folder's `__init__.py` calls it.
        what: it is, for messages.

    Raises:
        ValueError: there is nothing of that name, or it cannot be imported; says which names there are.
    """
    points = installed(group)
    try:
        if name in folders(package):
            return getattr(importlib.import_module(f"{package}.{name}"), attribute)
        if name in points:
            return points[name].load()
        if _IMPORT_PATH.fullmatch(name):
            module, _, member = name.partition(":")
            return getattr(importlib.import_module(module), member)
    except Exception as error:  # what code raises while it is imported has no common base
        raise ValueError(f"the {what} {name!r} cannot be imported: {reason(error)}") from error
    known = ", ".join(sorted({*folders(package), *points}))
    raise ValueError(f"there is no {what} {name!r}; there are {known}, and package.module:ATTRIBUTE")


def reason(error: Exception) -> str:
    """Why an import failed, in one line: `SyntaxError: invalid syntax (x.py, line 1)`."""
    said = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"{said}; the folder of a module that is not installed must be in PYTHONPATH"
    return said if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {said}"


@cache
def folders(package: str) -> tuple[str, ...]:
    """The capabilities of our own, by the alphabet."""
    paths = importlib.import_module(package).__path__
    return tuple(sorted(info.name for info in pkgutil.iter_modules(paths) if info.ispkg))


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group that installed packages have, by name."""
    return {point.name: point for point in entry_points(group=group)}
