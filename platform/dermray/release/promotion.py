"""Moving an alias of the registry: decided by reports and licences, written down before it is done, and undone."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dermray.config import TrackingConfig
from dermray.corpus.licences import CommercialUse
from dermray.errors import EvaluationError, TrackingError
from dermray.release import gate
from dermray.release.gate import Difference
from dermray.tracking import store
from dermray.tracking.registry import (
    COMMERCIAL_USE_TAG,
    WEIGHTS_TAG,
    ModelVersion,
    holder_of,
    of_other_kind,
    require_version,
)
from dermray.tracking.runs import Run

AUDIT_FILE = "promotion.json"
REPORT_URI_TAG, REPORT_DIGEST_TAG = "dermray.report_uri", "dermray.report_sha256"
# On a version that holds an alias: the version that held it before.
REPLACED_TAG = "dermray.replaced.{alias}"


@dataclass(frozen=True)
class Move:
    """An alias that is to go from one version to another, and what speaks against it.

    Attributes:
        before: number of the version that holds the alias now, or None.
        refusals: why it must not; empty if it may.
        differences: of the scores, where there is a version to compare with.
    """

    name: str
    alias: str
    before: str | None
    after: str
    refusals: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_allowed(self) -> bool:
        """Nothing speaks against it."""
        return not self.refusals

    def lines(self) -> list[str]:
        """For a terminal."""
        held = f"version {self.before}" if self.before else "free"
        head = f"models:/{self.name}@{self.alias}: {held} → version {self.after}"
        told = [f"warning: {line}" for line in self.facts.get("not_compared", ())]
        return [
            head,
            *told,
            *(one.line() for one in self.differences),
            *(f"refused: {reason}" for reason in self.refusals),
        ]

    def to_json(self) -> dict[str, Any]:
        """The audit record."""
        return {
            "model": self.name,
            "alias": self.alias,
            "before": self.before,
            "after": self.after,
            "is_allowed": self.is_allowed,
            "refusals": list(self.refusals),
            "differences": [one.to_json() for one in self.differences],
            "user": getpass.getuser(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.facts,
        }


def plan(
    config: TrackingConfig,
    *,
    name: str,
    candidate: str,
    alias: str,
    margin: float,
    metrics: Sequence[str] = (),
    commercial_aliases: Sequence[str] = (),
    allow_non_commercial: bool = False,
) -> Move:
    """Decide whether version `candidate` may take `alias`.

    Args:
        candidate: number of a version, or an alias of it.
        commercial_aliases: those that only models get whose data allow commercial use.
        allow_non_commercial: let it have one of these all the same; the audit record says so.

    Raises:
        TrackingError: the registry has no such model or version.
    """
    with store.asked(config) as registry:
        version = require_version(registry, name, candidate)
        holder = holder_of(registry, name, alias)
    refusals = []
    use = (version.tags or {}).get(COMMERCIAL_USE_TAG, str(CommercialUse.UNKNOWN))
    if alias in commercial_aliases and use != CommercialUse.ALLOWED and not allow_non_commercial:
        refusals.append(
            f"commercial use of version {version.version} is {use} (licence: "
            f"{(version.tags or {}).get('licence', 'not stated')}), and {alias} is for commercial use"
        )
    other = "" if holder is None else of_other_kind(holder.tags or {}, version.tags or {})
    differences: list[Difference] = []
    untold: list[str] = []
    if other:
        refusals.append(f"the champion {other}: whoever asks {alias} would get other answers")
    elif holder is not None and str(holder.version) == str(version.version):
        refusals.append(f"version {version.version} has the alias already")
    else:
        try:
            differences, untold = _differences(holder, version, margin, metrics)
            refusals += [
                f"{one.name} may be worse by {-one.low:.4f}, more than the margin of {one.margin:.4f}"
                for one in differences
                if one.is_worse
            ]
        except _NotComparableError as error:
            refusals += error.reasons
    facts = {
        "margin": margin,
        "reports": {str(v.version): dict(v.tags or {}).get(REPORT_DIGEST_TAG) for v in (holder, version) if v},
        "not_compared": untold,
        "commercial_use": use,
        "allow_non_commercial": allow_non_commercial,
    }
    before = None if holder is None else str(holder.version)
    return Move(name, alias, before, str(version.version), tuple(refusals), tuple(differences), facts)


def roll_back(config: TrackingConfig, *, name: str, alias: str) -> Move:
    """The move that gives an alias back to the version that had it before.

    Raises:
        TrackingError: nobody has the alias, or nobody had it before.
    """
    with store.asked(config) as registry:
        holder = holder_of(registry, name, alias)
        if holder is None:
            raise TrackingError(f"models:/{name}@{alias}: no version has this alias")
        before = (holder.tags or {}).get(REPLACED_TAG.format(alias=alias))
        if not before:
            raise TrackingError(
                f"models:/{name}@{alias}: version {holder.version} was the first; there is none before it"
            )
        version = require_version(registry, name, before)
    return Move(name, alias, str(holder.version), str(version.version), facts={"roll_back": True})


def carry_out(current: Run, move: Move) -> None:
    """Write the audit record into the run, then move the alias, then say that it has moved.

    Raises:
        TrackingError: something speaks against the move, MLflow is out of reach, or the alias has moved meanwhile.
    """
    if not move.is_allowed:
        raise TrackingError(f"models:/{move.name}@{move.alias} stays: {'; '.join(move.refusals)}")
    current.log_text(json.dumps(move.to_json(), indent=2) + "\n", AUDIT_FILE)
    registry, _ = current.connected()
    with store.answered(registry):
        holder = holder_of(registry, move.name, move.alias)
        if (None if holder is None else str(holder.version)) != move.before:
            raise TrackingError(f"models:/{move.name}@{move.alias} has moved meanwhile; look again")
        if move.before is not None and not move.facts.get("roll_back"):
            registry.set_model_version_tag(move.name, move.after, REPLACED_TAG.format(alias=move.alias), move.before)
        registry.set_registered_model_alias(move.name, move.alias, move.after)
    current.set_tags({"alias_moved": f"{move.name}@{move.alias}: {move.before} → {move.after}"})


class _NotComparableError(Exception):
    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


def _differences(
    champion: ModelVersion | None, candidate: ModelVersion, margin: float, metrics: Sequence[str]
) -> tuple[list[Difference], list[str]]:
    """Of the two versions' reports, and what these do not tell; none where nobody has the alias, but the candidate's
    report must be there.
    """
    try:
        theirs = _report(candidate)
        if champion is None:
            return [], []
        ours = _report(champion)
        reasons = gate.mismatches(ours, theirs)
        if reasons:
            raise _NotComparableError(reasons)
        return gate.compare(ours, theirs, margin=margin, metrics=metrics), gate.not_compared(ours, theirs)
    except EvaluationError as error:
        raise _NotComparableError([str(error)]) from None


def _report(version: ModelVersion) -> dict[str, gate.Scored]:
    tags = version.tags or {}
    if REPORT_URI_TAG not in tags:
        raise EvaluationError(f"version {version.version} was registered without a report; use jobs/register.py")
    reports = gate.load_report(tags[REPORT_URI_TAG], tags.get(REPORT_DIGEST_TAG))
    if WEIGHTS_TAG not in tags:
        raise EvaluationError(
            f"version {version.version} was registered without a digest of its weights; register again"
        )
    gate.require_model(reports, tags[WEIGHTS_TAG], f"version {version.version}")
    return reports
