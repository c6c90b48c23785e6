"""A new version behind an alias: examined, then followed without dropping a request; one step back when it disappoints.

Requests keep the version that they began with, so a change needs no pause. What a version failed at is recorded, and
it is not tried again until the alias moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dermray.corpus.ontology import Ontology
from dermray.errors import DermRayError
from dermray.serving import ModelSource
from dermray.serving.gate import Check
from serve.catalogue import Fleet, Served, Slot
from serve.errors import Refusal

logger = logging.getLogger("dermray.serve")
Event = Literal["unchanged", "followed", "refused", "rolled_back"]


class Registry(Protocol):
    """Where aliases point, and where changes are recorded. Blocking."""

    def version_at(self, uri: str) -> str:
        """The number of the version behind `models:/NAME@ALIAS`; cheap."""

    def resolve(self, uri: str, name: str | None = None) -> ModelSource:
        """The version behind `models:/NAME@ALIAS`."""

    def point(self, uri: str, version: str) -> None:
        """Move the alias to a version."""

    def record(self, event: str, before: str | None, after: str | None, checks: Sequence[Check]) -> None:
        """Keep an audit record."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a look at the alias, or a roll-back, led to."""

    event: Event
    version: str | None
    previous: str | None
    checks: tuple[Check, ...] = ()


class Rollout:
    """Follows the alias of one slot."""

    def __init__(self, slot: Slot, fleet: Fleet, registry: Registry, uri: str) -> None:
        self._slot = slot
        self._fleet = fleet
        self._registry = registry
        self._uri = uri
        self._refused: str | None = None
        self._changing = asyncio.Lock()

    async def poll(self, every_s: float) -> None:
        """Look at the alias now and then; a registry or replicas that are away are asked again next time."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except (DermRayError, Refusal) as error:
                logger.warning("the alias %s was not followed: %s", self._uri, error)

    async def look(self, *, again: bool = False) -> Outcome:
        """Follow the alias when it has moved and the version passes; `again` also tries a refused one.

        Raises:
            DermRayError: the registry cannot be asked.
            Refusal: the version cannot be examined just now.
        """
        async with self._changing:
            current = self._slot.current.source
            version = await asyncio.to_thread(self._registry.version_at, self._uri)
            known = current is not None and version == current.version
            if known or (version == self._refused and not again):
                return self._outcome("unchanged")
            # Fetches files, and the alias may have moved once more.
            source = await asyncio.to_thread(self._registry.resolve, self._uri, current.name if current else None)
            checks = await self._fleet.examine(source)
            passed = all(check.passed for check in checks)
            if passed:
                self._slot.follow(Served(await self._fleet.start(source), load_ontology(source), source))
                self._refused = None
            else:
                self._refused = source.version
            event: Event = "followed" if passed else "refused"
            await self._record(event, current.version if current else None, source.version, checks)
            return self._outcome(event, checks)

    async def roll_back(self) -> Outcome:
        """Let the version before answer again, and move the alias to it, so that it stays.

        Raises:
            Refusal: 409 when there is none.
            DermRayError: the registry does not move the alias; the version before answers all the same.
        """
        async with self._changing:
            before, previous = self._slot.current, self._slot.previous
            if previous is None or previous.source is None or previous.source.version is None:
                raise Refusal(409, "no earlier version has been served since the start", code="no_previous_version")
            self._slot.follow(previous)
            self._refused = before.model.version
            await asyncio.to_thread(self._registry.point, self._uri, previous.source.version)
            await self._record("rolled_back", before.model.version, previous.model.version, ())
            return self._outcome("rolled_back")

    async def _record(self, event: Event, before: str | None, after: str | None, checks: Sequence[Check]) -> None:
        logger.info("%s: %s, version %s to %s", self._uri, event, before, after)
        try:
            await asyncio.to_thread(self._registry.record, event, before, after, checks)
        except DermRayError as error:
            logger.warning("no audit record of %s: %s", event, error)

    def _outcome(self, event: Event, checks: Sequence[Check] = ()) -> Outcome:
        previous = self._slot.previous
        return Outcome(
            event, self._slot.current.model.version, previous.model.version if previous else None, tuple(checks)
        )


def load_ontology(source: ModelSource) -> Ontology | None:
    """The disease tree of a version, where it has one."""
    return Ontology.load(source.ontology_uri) if source.ontology_uri else None
