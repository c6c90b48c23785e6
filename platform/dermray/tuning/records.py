"""What is known of each trial: drawn values, curve, how it ended. Kept in the trial's folder, so that a sweep resumes.

OUTPUT/trials/trial-003/trial.json      written by the sweep's driver at every validation and at the end
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from pydantic import TypeAdapter
from scipy.special import stdtrit

from dermray import documents, redaction, storage
from dermray.config import Config
from dermray.errors import DermRayError
from dermray.tuning.basis import Basis

RECORD_NAME = "trial.json"
SEED_KEY = "seed"
# Of how many trials a line says the names.
NUM_NAMED = 4


class Status(StrEnum):
    """Where a trial stands."""

    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """True when the same command again has nothing to train; a failed trial is tried again."""
        return self in (Status.FINISHED, Status.STOPPED)


class AnyTrial(Protocol):
    """What a sweep asks of its trials, be they trainings or evaluations."""

    @property
    def name(self) -> str:
        """`trial-000`, …"""

    @property
    def params(self) -> dict[str, Any]:
        """Config key → value."""

    @property
    def config(self) -> Config:
        """What runs."""

    @property
    def uri(self) -> str:
        """The trial's own folder."""

    @property
    def basis(self) -> Basis:
        """What its figures follow from."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole trial."""

    def samples_at(self, step: int) -> int:
        """Training samples seen after `step` steps."""

    def label(self) -> str:
        """What was drawn, for humans."""

    def recipe_yaml(self) -> str:
        """The trial as a file that its job's `--config` takes."""


@dataclass(frozen=True)
class Point:
    """One validation of a trial.

    Attributes:
        validation: its number, from 1.
        step: optimiser steps taken.
        samples: training samples seen.
        metrics: `validation_…` figures.
    """

    validation: int
    step: int
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Exploit:
    """A trial of a population goes on from another's checkpoint, with settings near the other's.

    Attributes:
        generation: after which one, from 1.
        name, score: of the trial, and its objective then; None if it had failed.
        donor, donor_score: of the other.
        step: of the checkpoint.
        sha256: of the checkpoint's state.
        params: what the trial goes on with.
    """

    generation: int
    name: str
    score: float | None
    donor: str
    donor_score: float
    step: int
    sha256: str
    params: dict[str, Any]


@dataclass
class TrialRecord:
    """A trial so far.

    Attributes:
        params: those it began with.
        ended_at: Unix time of its end.
        basis: what its figures follow from, as it began; None: an earlier version made them, and did not write it down.
    """

    name: str
    params: dict[str, Any]
    status: Status = Status.UNFINISHED
    curve: list[Point] = field(default_factory=list)
    error: str = ""
    num_failures: int = 0
    exploits: list[Exploit] = field(default_factory=list)
    ended_at: float | None = None
    basis: Basis | None = None

    @classmethod
    def load(cls, trial: AnyTrial) -> TrialRecord:
        """The record in the trial's folder, or a fresh one.

        Raises:
            DermRayError: the folder belongs to another draw, its figures follow from another corpus or other settings,
                or its record is damaged.
        """
        uri = storage.join(trial.uri, RECORD_NAME)
        try:
            known = documents.as_record(_RECORD, storage.read_json(uri), uri, "remove it to train the trial again")
        except FileNotFoundError:
            return cls(trial.name, trial.params, basis=trial.basis)
        if known.params != trial.params:
            raise DermRayError(
                f"{uri} holds a trial of another sweep ({known.params}, now {trial.params}); give a new output, or the "
                "space and seed it began with"
            )
        if known.basis is None and not known.curve and not known.status.is_final:
            # It has no figures yet.
            known.basis = trial.basis
        if known.basis is not None and (found := known.basis.differences(trial.basis)):
            raise DermRayError(
                f"{uri} holds a trial of something else: {found}; give the sweep another output, or what it began with"
            )
        return known

    @staticmethod
    def params_at(uri: str) -> dict[str, Any] | None:
        """The values that a trial in the folder `uri` was begun with; None if none was."""
        file = storage.join(uri, RECORD_NAME)
        try:
            params = storage.read_object(file).get("params")
        except FileNotFoundError:
            return None
        return documents.as_object(params, f"params of {file}")

    def save(self, trial: AnyTrial) -> None:
        """Publish the record in the trial's folder."""
        storage.write_json(storage.join(trial.uri, RECORD_NAME), asdict(self))

    def end(self, status: Status, error: str) -> None:
        """The trial is at its end; a sweep that is begun again hears so once more, and keeps the time."""
        if self.ended_at is None or self.status is not status:
            self.ended_at = time.time()
        self.status, self.error = status, redaction.without_secrets(error)

    def add(self, point: Point) -> None:
        """Put a validation into the curve; one that was repeated after a restart replaces the earlier."""
        kept = [other for other in self.curve if other.validation != point.validation]
        self.curve = sorted([*kept, point], key=lambda p: p.validation)

    def value_at(self, validation: int, objective: str) -> float | None:
        """The objective at a validation, or None if the trial has none of that number."""
        return next((point.metrics.get(objective) for point in self.curve if point.validation == validation), None)

    @property
    def last_params(self) -> dict[str, Any]:
        """What the trial trains with now, or trained with at its end."""
        return self.exploits[-1].params if self.exploits else self.params

    def value(self, objective: str) -> float | None:
        """The objective at the last validation, or None without any."""
        return self.curve[-1].metrics.get(objective) if self.curve else None

    @property
    def samples_trained(self) -> int:
        """Training samples seen up to the last validation."""
        return self.curve[-1].samples if self.curve else 0


_RECORD = TypeAdapter(TrialRecord)


def of_earlier_versions(trials: Sequence[AnyTrial]) -> list[str]:
    """A line about figures that are taken over unseen, for whoever starts the sweep.

    Raises:
        DermRayError: as `TrialRecord.load`.
    """
    names = [trial.name for trial in trials if TrialRecord.load(trial).basis is None]
    if not names:
        return []
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return [
        f"{', '.join(names[:NUM_NAMED])}{more}: an earlier version wrote down the figures, and not which corpus and "
        "settings they follow from; they are taken as this sweep's. If they are not, give it another output"
    ]


def ranked(records: Sequence[TrialRecord], objective: str, mode: Literal["max", "min"]) -> list[TrialRecord]:
    """Best first: trials that ran to their end by their last figure, then the others by how far they came."""
    sign = -1.0 if mode == "max" else 1.0

    def key(record: TrialRecord) -> tuple[bool, int, float]:
        value = record.value(objective)
        finished = record.status is Status.FINISHED
        reached = 0 if finished or not record.curve else record.curve[-1].validation
        return not finished, -reached, sign * value if value is not None else float("inf")

    return sorted(records, key=key)


def best_of(records: Sequence[TrialRecord], objective: str, mode: Literal["max", "min"]) -> TrialRecord:
    """The best trial that ran to its end.

    Raises:
        DermRayError: none did; says what the first failure was.
    """
    first = ranked(records, objective, mode)[0]
    if first.status is not Status.FINISHED:
        reason = next((f"; {record.name}: {record.error}" for record in records if record.error), "")
        raise DermRayError(f"no trial of the sweep ran to its end{reason}")
    return first


@dataclass(frozen=True)
class Setting:
    """Trials that differ in `seed` only: mean of their objective and its 95 % interval (Student's t over seeds)."""

    params: dict[str, Any]
    num_seeds: int
    mean: float
    low: float | None
    high: float | None


def over_seeds(records: Sequence[TrialRecord], objective: str, mode: Literal["max", "min"]) -> list[Setting]:
    """The settings of trials that ran to their end, best mean first; without two seeds there is no interval."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.status is Status.FINISHED:
            setting = {key: value for key, value in record.params.items() if key != SEED_KEY}
            groups.setdefault(json.dumps(setting, sort_keys=True), []).append(record)
    found = [
        _setting(json.loads(key), [r.curve[-1].metrics[objective] for r in group]) for key, group in groups.items()
    ]
    return sorted(found, key=lambda setting: setting.mean, reverse=mode == "max")


def _setting(params: dict[str, Any], values: list[float]) -> Setting:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Setting(params, len(values), mean, None, None)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return Setting(params, len(values), mean, mean - half, mean + half)


def leaderboard(records: Sequence[TrialRecord], objective: str, mode: Literal["max", "min"]) -> str:
    """A text table, best first."""
    rows = [("trial", "status", objective, "validations", "samples", "settings")]
    for record in ranked(records, objective, mode):
        value = record.value(objective)
        rows.append(
            (
                record.name,
                str(record.status),
                "-" if value is None else f"{value:.4f}",
                str(len(record.curve)),
                f"{record.samples_trained:,}",
                " ".join(f"{key}={value}" for key, value in record.last_params.items()),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
