"""Which weights a run ends with: the keys that decide it, as they say beside themselves in their settings.

A checkpoint holds them, and a run that resumes must agree on all. Whoever adds a key marks it `DecidesWeights` or
`LeavesWeights` (`dermray.config`); a test finds the one that says neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dermray import keys
from dermray.config import Bearing


def decisive(config: BaseModel) -> dict[str, Any]:
    """The keys that decide the weights by their dotted names, with their values as JSON has them."""
    return dict(_decisive(config, config.model_dump(mode="json"), ""))


def _decisive(section: BaseModel, dumped: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        value, bearing = getattr(section, name), bearing_of(field)
        if bearing is None and isinstance(value, BaseModel):
            yield from _decisive(value, dumped[name], f"{prefix}{name}.")
        elif bearing is None and isinstance(value, tuple):
            for place, part in enumerate(value):
                yield from _decisive(part, dumped[name][place], f"{prefix}{name}.{place}.")
        elif bearing is Bearing.DECIDES:
            yield f"{prefix}{name}", dumped[name]


def undeclared(section: type[BaseModel]) -> list[str]:
    """Dotted names of the keys of which nobody says whether they decide the weights."""
    return list(_undeclared(section, ""))


def _undeclared(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if bearing_of(field) is not None:
            continue
        inner = keys.section_of(field.annotation) or keys.section_of_entries(field.annotation)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _undeclared(inner, f"{prefix}{name}.")


def bearing_of(field: FieldInfo) -> Bearing | None:
    """What a key, or a whole section, says of itself."""
    return next((mark for mark in field.metadata if isinstance(mark, Bearing)), None)
