"""A new version behind an alias: examined, then followed without dropping a request; one step back when it disappoints.

One `Rollout` a model decides and records, however many gateways answer; they keep its `Standing` and serve what that
says. Requests keep the version that they began with, so a change needs no pause. What a version failed at is recorded,
and it is not tried again until the alias moves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from dermray.corpus import branches
from dermray.corpus.ontology import Ontology
from dermray.errors import DermRayError
from dermray.predict import ModelSource
from dermray.release.golden import Check
from dermray.service.refusals import Refusal

logger = logging.getLogger("dermray.serve")
# How long a gateway waits for a change before it asks once more.
WAIT_S = 3.0
SETTLE_S = 2.0
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


class Examiner(Protocol):
    """The processes in which the versions of a model run."""

    async def examine(self, source: ModelSource) -> list[Check]:
        """Load a version everywhere and say what it shows; see `dermray.release.golden`.

        Raises:
            Refusal: 503 when that is not possible just now.
        """


@dataclass(frozen=True, slots=True)
class Standing:
    """Which version of a model answers.

    `num_changes` counts up, so that of two standings the later one is known. `refused` is the version that failed, or
    was left, and is not tried again by itself.
    """

    current: ModelSource
    previous: ModelSource | None = None
    refused: str | None = None
    num_changes: int = 0


Standings = dict[str, Standing]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a look at the alias, or a roll-back, led to."""

    event: Event
    version: str | None
    previous: str | None
    checks: tuple[Check, ...] = ()


class Changes(Protocol):
    """What an administrator may ask of a model that follows an alias."""

    async def look(self, *, again: bool = False) -> Outcome:
        """See `Rollout.look`."""

    async def roll_back(self) -> Outcome:
        """See `Rollout.roll_back`."""


class Rollout:
    """Follows the alias of one model."""

    def __init__(self, source: ModelSource, fleet: Examiner, registry: Registry, uri: str) -> None:
        self._standing = Standing(source)
        self._fleet = fleet
        self._registry = registry
        self._uri = uri
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def standing(self) -> Standing:
        """Which version answers."""
        return self._standing

    def adopt(self, known: Standing) -> None:
        """Take over what a gateway keeps, when it is later: this process began anew, and the gateway did not."""
        if known.num_changes > self._standing.num_changes:
            self._set(known)

    async def later_than(self, num_changes: int) -> None:
        """Return once there have been more changes than so many."""
        while self._standing.num_changes <= num_changes:
            await self._changed.wait()

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
            current = self._standing.current
            version = await asyncio.to_thread(self._registry.version_at, self._uri)
            if version == current.version or (version == self._standing.refused and not again):
                return self._outcome("unchanged")
            # Fetches files, and the alias may have moved once more.
            source = await asyncio.to_thread(self._registry.resolve, self._uri, current.name)
            passed, checks = await self._examined(source)
            if not passed:
                self._set(replace(self._standing, refused=source.version, num_changes=self._standing.num_changes + 1))
                return self._outcome("refused", checks)
            self._answer(source, refused=None)
            await self._record("followed", current.version, source.version, checks)
            return self._outcome("followed", checks)

    async def roll_back(self) -> Outcome:
        """Let the version before answer again, and move the alias to it, so that it stays.

        After a restart the audit records tell which one that was; it is loaded and examined like a new one.

        Raises:
            Refusal: 409 when there is none; 503 when it cannot be examined just now.
            DermRayError: the registry cannot be asked, or does not move the alias.
        """
        async with self._changing:
            before = self._standing.current.version
            previous = self._standing.previous
            checks: tuple[Check, ...] = ()
            if previous is None:
                previous = await self._remembered()
                passed, checks = await self._examined(previous)
                if not passed:
                    return self._outcome("refused", checks)
            self._answer(previous, refused=before)
            try:
                await asyncio.to_thread(self._registry.point, self._uri, str(previous.version))
            finally:
                await self._record("rolled_back", before, previous.version, checks)
            return self._outcome("rolled_back", checks)

    async def _remembered(self) -> ModelSource:
        """The version before this start."""
        source = await asyncio.to_thread(self._registry.before, self._uri, self._standing.current)
        if source is None:
            raise Refusal(409, "no earlier version is known to have been served", code="no_previous_version")
        return source

    async def _examined(self, source: ModelSource) -> tuple[bool, tuple[Check, ...]]:
        """Whether a version may answer; when it failed a check, that is recorded."""
        served = self._standing.current.kind
        if source.kind == served:
            checks = tuple(await self._fleet.examine(source))
        else:
            # Whoever asks this model would get other answers.
            checks = (
                Check("kind", False, f"a model of the kind {source.kind}, and one of the kind {served} is served"),
            )
        passed = all(check.passed for check in checks)
        if not passed:
            await self._record("refused", self._standing.current.version, source.version, checks)
        return passed, checks

    def _answer(self, source: ModelSource, *, refused: str | None) -> None:
        self._set(Standing(source, self._standing.current, refused, self._standing.num_changes + 1))

    def _set(self, standing: Standing) -> None:
        self._standing = standing
        self._changed.set()
        self._changed = asyncio.Event()

    async def _record(self, event: Event, before: str | None, after: str | None, checks: Sequence[Check]) -> None:
        logger.info("%s: %s, version %s to %s", self._uri, event, before, after)
        answers = self._standing.current
        try:
            await asyncio.to_thread(self._registry.record, self._uri, answers, event, before, after, checks)
        except DermRayError as error:
            logger.warning("no audit record of %s: %s", event, error)

    def _outcome(self, event: Event, checks: Sequence[Check] = ()) -> Outcome:
        previous = self._standing.previous
        return Outcome(event, self._standing.current.version, previous.version if previous else None, tuple(checks))


class Rollouts:
    """The roll-outs of all models, as gateways ask for them."""

    def __init__(self, rollouts: dict[str, Rollout], poll_s: float) -> None:
        """By the models' names; `poll_s` as in `RolloutConfig`."""
        self._rollouts = rollouts
        self._poll_s = poll_s
        self._polls: list[asyncio.Task[None]] = []

    async def standings(self, known: Standings) -> Standings:
        """Which versions answer; returns when that is not what the caller knows, or after `WAIT_S`."""
        self._adopt(known)
        if self._poll_s and not self._polls:
            self._polls = [asyncio.create_task(self._poll(one)) for one in self._rollouts.values()]
        changes = [
            asyncio.ensure_future(rollout.later_than(known[name].num_changes if name in known else -1))
            for name, rollout in self._rollouts.items()
        ]
        await asyncio.wait(changes, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        for change in changes:
            change.cancel()
        return self._standings()

    async def look(self, name: str, known: Standings) -> tuple[Outcome, Standings]:
        """See `Rollout.look`; also tries a refused version again."""
        self._adopt(known)
        return await self._rollouts[name].look(again=True), self._standings()

    async def roll_back(self, name: str, known: Standings) -> tuple[Outcome, Standings]:
        """See `Rollout.roll_back`."""
        self._adopt(known)
        return await self._rollouts[name].roll_back(), self._standings()

    async def _poll(self, rollout: Rollout) -> None:
        # Not before every gateway has been heard: one may know of changes that this process does not.
        await asyncio.sleep(SETTLE_S)
        await rollout.poll(self._poll_s)

    def _adopt(self, known: Standings) -> None:
        for name, standing in known.items():
            self._rollouts[name].adopt(standing)

    def _standings(self) -> Standings:
        return {name: rollout.standing for name, rollout in self._rollouts.items()}


def load_ontology(source: ModelSource) -> Ontology | None:
    """The disease tree of a version, where it has one."""
    return branches.load(source.ontology_uri) if source.ontology_uri else None
