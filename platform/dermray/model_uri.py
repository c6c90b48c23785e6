"""What a user may write for a model, told apart without loading torch."""

from __future__ import annotations

from dermray import storage

LOCAL_PREFIX = "local-dir:"
HUB_PREFIX = "hf-hub:"


def folder_uri(name_or_uri: str) -> str | None:
    """The URI of a model folder (a path, a URI or `local-dir:PATH`); None for an architecture's name or a hub id."""
    if name_or_uri.startswith(LOCAL_PREFIX):
        return storage.normalise(name_or_uri.removeprefix(LOCAL_PREFIX))
    if name_or_uri.startswith(HUB_PREFIX):
        return None
    looks_like_path = "/" in name_or_uri or name_or_uri.startswith((".", "~"))
    if looks_like_path or storage.exists(name_or_uri):
        return storage.normalise(name_or_uri)
    return None
