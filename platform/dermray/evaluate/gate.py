"""Whether a candidate model may take a champion's place: no score may be worse by more than a stated margin.

Both reports must be of the same benchmark: same corpus digest, split and zero-shot templates. For each score the
difference candidate - champion gets a 95 % interval, and the worse end of it must not lie further down than the margin.
`interval_of` is the one place that computes it: from the intervals of the two reports, as if the two models had been
scored on different images. On the same images their scores mostly rise and fall together, so that this interval is
wider than a paired one: it may refuse what a paired one lets through, and rarely the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dermray import storage
from dermray.errors import EvaluationError

REPORT_NAME = "report.json"
MAX_REPORT_BYTES = 256 << 20
# Scores of which less is better; ranks have no upper end, so that their margin is a share of the champion's.
LOWER_IS_BETTER = ("_rank", "ece", "brier", "brier_score", "calibration_error", "nll", "gap")
RELATIVE = ("_rank",)
METHOD = "unpaired"


@dataclass(frozen=True)
class Difference:
    """One score of both models. `difference`, `low` and `high` are turned so that more is better.

    Attributes:
        name: `TASK.METRIC`, in a suite after `DATASET/`.
        method: how the interval came about.
    """

    name: str
    champion: float
    candidate: float
    difference: float
    low: float
    high: float
    margin: float
    method: str = METHOD

    @property
    def is_worse(self) -> bool:
        """True if the candidate may be worse by more than the margin."""
        return not self.low >= -self.margin

    def line(self) -> str:
        """For a terminal."""
        verdict = "worse" if self.is_worse else "ok"
        return (
            f"{verdict:<5} {self.name}: {self.champion:.4f} → {self.candidate:.4f}, difference {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] ({self.method}), margin {self.margin:.4f}"
        )

    def to_json(self) -> dict[str, Any]:
        """A document with the same fields, and the verdict."""
        return {**asdict(self), "is_worse": self.is_worse}


def load_report(uri: str, sha256: str | None = None) -> dict[str, dict[str, Any]]:
    """The reports in an evaluation's output: one named "", or those of a suite by data set.

    Args:
        sha256: of `report.json`, as it was registered.

    Raises:
        EvaluationError: there is none, or it has another digest.
    """
    file = storage.join(uri, REPORT_NAME)
    if not storage.exists(file):
        raise EvaluationError(f"{file} does not exist; run jobs/evaluate.py with output={uri}")
    if sha256 is not None and storage.sha256(file) != sha256:
        raise EvaluationError(f"{file} is not the report that the model was registered with (digest {sha256[:12]})")
    document = storage.read_json(file)
    if "benchmarks" not in document:
        return {"": document}
    return {name: storage.read_json(storage.join(uri, part["report"])) for name, part in document["benchmarks"].items()}


def mismatches(champion: Mapping[str, Mapping[str, Any]], candidate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why two evaluations cannot be compared; empty if they can."""
    found = [f"the candidate was not scored on {name}" for name in champion if name not in candidate]
    for name in champion.keys() & candidate.keys():
        ours, theirs = _benchmark_of(candidate[name]), _benchmark_of(champion[name])
        found += [
            f"{name + ': ' if name else ''}{key} is {_short(ours[key])}, the champion's {_short(theirs[key])}"
            for key in ours
            if ours[key] != theirs[key]
        ]
    return found


def compare(
    champion: Mapping[str, Mapping[str, Any]],
    candidate: Mapping[str, Mapping[str, Any]],
    *,
    margin: float,
    metrics: Sequence[str] = (),
) -> list[Difference]:
    """Every score that the champion has, or those of `metrics` (`TASK.METRIC`).

    Raises:
        EvaluationError: a score is missing on either side, or has no interval.
    """
    found = [
        _difference(name, known, candidate, margin)
        for name, known in _scores(champion).items()
        if not metrics or name.rpartition("/")[2] in metrics
    ]
    missing = [name for name in metrics if not any(one.name.rpartition("/")[2] == name for one in found)]
    if missing or not found:
        raise EvaluationError(f"the champion's report has no {', '.join(missing) or 'scores'}")
    return found


def _difference(
    name: str, champion: Mapping[str, Any], candidates: Mapping[str, Mapping[str, Any]], margin: float
) -> Difference:
    candidate = _scores(candidates).get(name)
    if candidate is None:
        raise EvaluationError(f"the candidate's report has no {name}, which the champion was scored by")
    sign = -1.0 if name.endswith(LOWER_IS_BETTER) else 1.0
    difference, low, high = interval_of(name, champion, candidate, sign)
    allowed = margin * abs(champion["value"]) if name.endswith(RELATIVE) else margin
    return Difference(name, champion["value"], candidate["value"], difference, low, high, allowed)


def interval_of(
    name: str, champion: Mapping[str, Any], candidate: Mapping[str, Any], sign: float
) -> tuple[float, float, float]:
    """Difference candidate - champion times `sign`, and the ends of its 95 % interval.

    Raises:
        EvaluationError: one of the scores has no interval.
    """
    for whose, metric in (("champion", champion), ("candidate", candidate)):
        if any(metric[key] is None for key in ("value", "low", "high")):
            raise EvaluationError(f"{name} of the {whose} has no interval; evaluate it with bootstrap=1000")
    ours, theirs = [sorted(sign * metric[key] for key in ("low", "high")) for metric in (candidate, champion)]
    value, before = sign * candidate["value"], sign * champion["value"]
    below = math.hypot(value - ours[0], theirs[1] - before)
    above = math.hypot(ours[1] - value, before - theirs[0])
    return value - before, value - before - below, value - before + above


def _scores(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return dict(_each_score(reports))


def _each_score(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for dataset, document in reports.items():
        for task, section in document["tasks"].items():
            for metric, score in section["metrics"].items():
                if score["value"] is not None:
                    yield f"{dataset + '/' if dataset else ''}{task}.{metric}", score


def _benchmark_of(document: Mapping[str, Any]) -> dict[str, Any]:
    zero_shot = document["tasks"].get("zero_shot", {})
    return {
        "corpus digest": document["corpus"]["digest"],
        "split": document["corpus"]["split"],
        "list of templates": zero_shot.get("templates"),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
