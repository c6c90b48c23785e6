"""Licences of data, as SPDX writes them, and what they say about commercial use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from dermray.corpus.manifest import Manifest

_NON_COMMERCIAL = re.compile(r"(?i)(^|[\s\-_])(nc|non-?commercial|research)([\s\-_]|$)")


class CommercialUse(StrEnum):
    """Whether a model trained on the data may be used commercially, as far as its licences say."""

    ALLOWED = "allowed"
    FORBIDDEN = "forbidden"
    UNKNOWN = "unknown"


def of_corpus(manifest: Manifest) -> tuple[str | None, ...]:
    """The licences of a corpus's sources (`licence=` of jobs/prepare.py); None stands for a source that named none."""
    return _named(manifest.provenance)


def of_model(provenance: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The licences of the data that a model was trained on, from its `dermray.json`."""
    return _named(provenance)


def _named(provenance: Mapping[str, Any]) -> tuple[str | None, ...]:
    named = provenance.get("licences")
    if not isinstance(named, list) or not named:
        return (None,)
    # Whatever else stands there names no licence.
    return tuple(name if isinstance(name, str) else None for name in named)


def commercial_use(licences: Iterable[str | None]) -> CommercialUse:
    """One non-commercial licence forbids it for all; one that is not known leaves it open."""
    known = list(licences)
    if any(name is not None and _NON_COMMERCIAL.search(name) for name in known):
        return CommercialUse.FORBIDDEN
    return CommercialUse.UNKNOWN if not known or None in known else CommercialUse.ALLOWED
