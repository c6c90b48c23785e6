"""How a capability is found by its name: a folder of ours, an installed package's entry point, or an import path."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

KindT = TypeVar("KindT")


def find(name: str, kind: type[KindT], *, package: str, group: str, attribute: str, what: str) -> KindT:
    """What a name stands for, imported.

    Args:
        name: of a folder of `package`, of an entry point of `group`, or `package.module:ATTRIBUTE`; in this order.
        kind: what it must be.
        package: import path of the package whose folders are the capabilities of our own.
        group: of entry points.
        attribute: what a folder's `__init__.py` calls it.
        what: it is, for messages.

    Raises:
        ValueError: there is nothing of that name, and says which names there are; or it cannot be imported, or is
            something else.
    """
    points = installed(group)
    with importing(f"the {what} {name!r}", ValueError):
        if name in folders(package):
            found = getattr(importlib.import_module(f"{package}.{name}"), attribute)
        elif name in points:
            found = points[name].load()
        elif _IMPORT_PATH.fullmatch(name):
            module, _, member = name.partition(":")
            found = getattr(importlib.import_module(module), member)
        else:
            found = None
    if found is None:
        known = ", ".join(sorted({*folders(package), *points}))
        raise ValueError(f"there is no {what} {name!r}; there are {known}, and package.module:ATTRIBUTE")
    if not isinstance(found, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"the {what} {name!r} is a {type(found).__name__}, and must be {article} {kind.__name__}")
    return found


def member(module: str, attribute: str, what: str, error: type[Exception]) -> Any:
    """What a module calls so, imported.

    Raises:
        Exception: of the type `error`: WHAT cannot be imported, and why.
    """
    with importing(what, error):
        return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def importing(what: str, error: type[Exception]) -> Iterator[None]:
    """Within the block code is imported that may be anybody's; what it raises becomes one line of an `error`.

    Raises:
        Exception: of the type `error`: WHAT cannot be imported, and why.
    """
    try:
        yield
    except Exception as cause:  # what code raises while it is imported has no common base
        raise error(f"{what} cannot be imported: {reason(cause)}") from cause


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
