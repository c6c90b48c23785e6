"""Towers, and loading and saving them in open_clip's folder layout."""

from dermray.models.factory import Preprocessing, architecture, create, located, preprocessing, tokenizer
from dermray.models.folder import DERMRAY_NAME, WEIGHTS_NAME, save

__all__ = [
    "DERMRAY_NAME",
    "WEIGHTS_NAME",
    "Preprocessing",
    "architecture",
    "create",
    "located",
    "preprocessing",
    "save",
    "tokenizer",
]
