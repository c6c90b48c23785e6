"""Symbolic links that lead out of a folder: what is in it is its author's, and what they name is not.

A hard link looks like any other file, and stores have neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from dermray import storage


def linked_outside(folder: str, names: Iterable[str]) -> str | None:
    """The first of some files of a folder that a link leads out of it; None where there is none, and in a store.

    Args:
        folder: path or URI; it may be a link itself.
        names: relative to it; they need not be there.
    """
    if not storage.is_local(folder):
        return None
    root = os.path.realpath(storage.local_path(folder))
    folders: dict[str, bool] = {}
    for name in names:
        path = os.path.join(root, name)
        parent = os.path.dirname(path)
        if parent not in folders:
            folders[parent] = is_within(parent, root)
        if not folders[parent] or (os.path.islink(path) and not is_within(path, root)):
            return name
    return None


def is_within(path: str, real_root: str) -> bool:
    """Whether a path, its links resolved, lies in a folder that has none in its own path."""
    return os.path.commonpath([os.path.realpath(path), real_root]) == real_root
