"""Towers, and loading and saving them in open_clip's folder layout."""

from dermray.models.factory import (
    Preprocessing,
    architecture,
    check,
    create,
    located,
    located_weights,
    preprocessing,
    tokenizer,
)
from dermray.models.folder import DERMRAY_NAME, WEIGHTS_NAME, save
from dermray.models.towers import is_ours as has_own_towers

__all__ = [
    "DERMRAY_NAME",
    "WEIGHTS_NAME",
    "Preprocessing",
    "architecture",
    "check",
    "create",
    "has_own_towers",
    "located",
    "located_weights",
    "preprocessing",
    "save",
    "tokenizer",
]
