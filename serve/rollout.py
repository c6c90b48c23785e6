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

    def before(self, uri: str, source: ModelSource) -> ModelSource | None:
        """The version that answered before `source`, by the audit records; None when they know of none."""

    def record(
        self, uri: str, answers: ModelSource, event: str, before: str | None, after: str | None, checks: Sequence[Check]
    ) -> None:
        """Keep an audit record; `answers` is the version that answers from now on."""


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
            served, checks = await self._prepared(source)
            if served is None:
                self._refused = source.version
                return self._outcome("refused", checks)
            before = self._slot.current.model.version
            self._slot.follow(served)
            self._refused = None
            await self._record("followed", before, source.version, checks)
            return self._outcome("followed", checks)

    async def roll_back(self) -> Outcome:
        """Let the version before answer again, and move the alias to it, so that it stays.

        After a restart the audit records tell which one that was; it is loaded and examined like a new one.

        Raises:
            Refusal: 409 when there is none; 503 when it cannot be examined just now.
            DermRayError: the registry cannot be asked, or does not move the alias.
        """
        async with self._changing:
            before = self._slot.current.model.version
            previous = self._slot.previous
            checks: tuple[Check, ...] = ()
            if previous is None:
                previous, checks = await self._prepared(await self._remembered())
            if previous is None:
                return self._outcome("refused", checks)
            self._slot.follow(previous)
            self._refused = before
            try:
                await asyncio.to_thread(self._registry.point, self._uri, str(previous.model.version))
            finally:
                await self._record("rolled_back", before, previous.model.version, checks)
            return self._outcome("rolled_back", checks)

    async def _remembered(self) -> ModelSource:
        """The version before this start."""
        current = self._slot.current.source
        source = await asyncio.to_thread(self._registry.before, self._uri, current) if current is not None else None
        if source is None:
            raise Refusal(409, "no earlier version is known to have been served", code="no_previous_version")
        return source

    async def _prepared(self, source: ModelSource) -> tuple[Served | None, tuple[Check, ...]]:
        """A version loaded and examined, ready to answer; None, and a record, when it failed a check."""
        checks = tuple(await self._fleet.examine(source))
        if all(check.passed for check in checks):
            return Served(await self._fleet.start(source), load_ontology(source), source), checks
        await self._record("refused", self._slot.current.model.version, source.version, checks)
        return None, checks

    async def _record(self, event: Event, before: str | None, after: str | None, checks: Sequence[Check]) -> None:
        logger.info("%s: %s, version %s to %s", self._uri, event, before, after)
        answers = self._slot.current.source
        assert answers is not None
        try:
            await asyncio.to_thread(self._registry.record, self._uri, answers, event, before, after, checks)
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
