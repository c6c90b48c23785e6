"""Towers, and loading and saving them in open_clip's folder layout. What a name stands for is told without torch."""

import importlib
from typing import TYPE_CHECKING, Any

from dermray.models.architectures import architecture, check, described, located, located_weights
from dermray.models.architectures import is_ours as has_own_towers
from dermray.models.layout import DERMRAY_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from dermray.models.factory import Preprocessing, create, preprocessing, tokenizer
    from dermray.models.folder import save

__all__ = [
    "DERMRAY_NAME",
    "WEIGHTS_NAME",
    "Preprocessing",
    "architecture",
    "check",
    "create",
    "described",
    "has_own_towers",
    "located",
    "located_weights",
    "preprocessing",
    "save",
    "tokenizer",
]
# What loads torch and open_clip, and takes seconds, is imported when it is asked for.
_BUILDING = {"Preprocessing": "factory", "create": "factory", "preprocessing": "factory", "tokenizer": "factory"}
_BUILDING |= {"save": "folder"}


def __getattr__(name: str) -> Any:
    if name not in _BUILDING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_BUILDING[name]}"), name)
