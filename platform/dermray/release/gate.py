"""Whether a candidate model may take a champion's place: no score may be worse by more than a stated margin.

Both reports must be of the same benchmark: same corpus digest, split and zero-shot templates, and of each task the same
predictor with the same keys and the same options (`neighbours`, `shots`, …: keys that the task says it uses). For each
score the difference candidate - champion gets a 95 % interval, and the worse end of it must not lie further
down than the margin.

The interval is that of the paired bootstrap (`dermray.evaluate.compare`) where both reports have saved predictions.
Other scores get one from the two reports' own intervals, as if the models had been scored on different images: it is
wider, since on the same images scores rise and fall together, and refuses more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dermray import scales, storage
from dermray.errors import EvaluationError
from dermray.evaluate import compare as compare_models

REPORT_NAME = "report.json"
PAIRED, UNPAIRED = "paired", "unpaired"

Interval = tuple[float, float, float]


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
    method: str

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


@dataclass(frozen=True)
class Scored:
    """A report: the folder that it lies in, and its document."""

    uri: str
    document: Mapping[str, Any]


def load_report(uri: str, sha256: str | None = None) -> dict[str, Scored]:
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
    if not isinstance(document, dict) or "benchmarks" not in document:
        return {"": Scored(uri, compare_models.whole(document, file))}
    try:
        files = {name: storage.inside(uri, part["report"]) for name, part in document["benchmarks"].items()}
    except (AttributeError, KeyError, TypeError):
        raise EvaluationError(f"{file} is no report of jobs/evaluate.py") from None
    return {name: Scored(one.rpartition("/")[0], _of_suite(one)) for name, one in files.items()}


def _of_suite(file: str) -> Mapping[str, Any]:
    try:
        return compare_models.whole(storage.read_json(file), file)
    except FileNotFoundError:
        raise EvaluationError(f"{file} does not exist, and the report of its suite names it; evaluate again") from None


def require_model(reports: Mapping[str, Scored], weights_sha256: str, model: str) -> None:
    """Refuse reports that are of another model.

    Args:
        weights_sha256: digest of the weights of `model`.

    Raises:
        EvaluationError: a report scored other weights; names both.
    """
    for scored in reports.values():
        digest = str(scored.document["model"]["model_digest"])
        if digest != weights_sha256:
            raise EvaluationError(
                f"{storage.join(scored.uri, REPORT_NAME)} is of another model ({scored.document['model'].get('uri')}, "
                f"weights {digest[:12]}) than {model} (weights {weights_sha256[:12]}): score this one with "
                "jobs/evaluate.py"
            )


def mismatches(champion: Mapping[str, Scored], candidate: Mapping[str, Scored]) -> list[str]:
    """Why two evaluations cannot be compared; empty if they can."""
    found = [f"the candidate was not scored on {name}" for name in champion if name not in candidate]
    for name in champion.keys() & candidate.keys():
        both = candidate[name].document, champion[name].document
        tasks = [task for task in both[1]["tasks"] if task in both[0]["tasks"]]
        ours, theirs = (_benchmark_of(document, tasks) for document in both)
        found += [
            f"{name + ': ' if name else ''}{key} is {_short(ours.get(key))}, the champion's {_short(theirs.get(key))}"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        options = [_options_of(document, tasks) for document in both]
        found += [
            f"{name + ': ' if name else ''}{key} is {options[0][key]}, the champion's {options[1][key]}"
            for key in options[1]
            if key in options[0] and options[0][key] != options[1][key]
        ]
    return found


def not_compared(champion: Mapping[str, Scored], candidate: Mapping[str, Scored]) -> list[str]:
    """A line for each option that decides a score and that one of the reports, of an earlier version, does not tell."""
    found = []
    for name in champion.keys() & candidate.keys():
        both = champion[name].document, candidate[name].document
        tasks = [task for task in both[0]["tasks"] if task in both[1]["tasks"]]
        before, after = (_options_of(document, tasks) for document in both)
        for whose, mine, other in (("champion", before, after), ("candidate", after, before)):
            found += [
                f"{name + ': ' if name else ''}the {whose}'s report does not say {key}: taken as the other's, "
                f"{other[key]}"
                for key in other
                if key not in mine
            ]
    return found


def _options_of(document: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    return {key: value for task in tasks for key, value in compare_models.options_of(document, task).items()}


def compare(
    champion: Mapping[str, Scored],
    candidate: Mapping[str, Scored],
    *,
    margin: float,
    metrics: Sequence[str] = (),
) -> list[Difference]:
    """Every score that the champion has, or those of `metrics` (`TASK.METRIC`).

    Raises:
        EvaluationError: a score is missing on either side or has no interval, or saved predictions do not fit together.
    """
    before, after = _scores(champion), _scores(candidate)
    wanted = [name for name in before if not metrics or name.rpartition("/")[2] in metrics]
    missing = [name for name in metrics if not any(one.rpartition("/")[2] == name for one in wanted)]
    if missing or not wanted:
        raise EvaluationError(f"the champion's report has no {', '.join(missing) or 'scores'}")
    absent = [name for name in wanted if name not in after]
    if absent:
        raise EvaluationError(f"the candidate's report has no {absent[0]}, which the champion was scored by")
    paired = _paired(champion, candidate, {name.rpartition(".")[0] for name in wanted})
    return [_difference(name, before[name], after[name], paired.get(name), margin) for name in wanted]


def _difference(
    name: str, champion: Mapping[str, Any], candidate: Mapping[str, Any], paired: Interval | None, margin: float
) -> Difference:
    scale = scales.of(name, champion)
    sign = -1.0 if scale.lower_is_better else 1.0
    if paired is None:
        difference, low, high = interval_of(name, champion, candidate, sign)
    else:
        low, difference, high = sorted(sign * end for end in paired) if sign < 0 else paired
    # What is no share of 1, a rank or a length, has no upper end.
    allowed = margin if scale.is_share else margin * abs(champion["value"])
    method = UNPAIRED if paired is None else PAIRED
    return Difference(name, champion["value"], candidate["value"], difference, low, high, allowed, method)


def _paired(
    champion: Mapping[str, Scored], candidate: Mapping[str, Scored], tasks: Collection[str]
) -> dict[str, Interval]:
    """Low end, value and high end of candidate - champion, by the name of the score, where predictions were saved."""
    found: dict[str, Interval] = {}
    for dataset, before in champion.items():
        after = candidate[dataset]
        for task, section in before.document["tasks"].items():
            name = f"{dataset}/{task}" if dataset else task
            if name not in tasks or not all(
                one.get("predictions") for one in (section, after.document["tasks"].get(task, {}))
            ):
                continue
            known = [compare_models.load(one.uri, one.document, task) for one in (before, after)]
            compare_models.check_origins(before.uri, known[0][1], after.uri, known[1][1])
            prefix = getattr(known[0][0], "prefix", "")
            for metric, one in compare_models.compare(known[0][0], known[1][0]).items():
                difference = one.difference
                if difference.low is not None and difference.high is not None:
                    found[f"{name}.{prefix}{metric}"] = (difference.low, difference.value, difference.high)
    return found


def interval_of(name: str, champion: Mapping[str, Any], candidate: Mapping[str, Any], sign: float) -> Interval:
    """Difference candidate - champion times `sign`, and the ends of its 95 % interval, from two intervals.

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


def _scores(reports: Mapping[str, Scored]) -> dict[str, Mapping[str, Any]]:
    return dict(_each_score(reports))


def _each_score(reports: Mapping[str, Scored]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for dataset, scored in reports.items():
        for task, section in scored.document["tasks"].items():
            for metric, score in section["metrics"].items():
                if score["value"] is not None:
                    yield f"{dataset + '/' if dataset else ''}{task}.{metric}", score


def _benchmark_of(document: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """What two reports must agree in; who predicts in `tasks`, those that both have."""
    zero_shot = document["tasks"].get("zero_shot", {})
    return {
        "corpus digest": document["corpus"]["digest"],
        "split": document["corpus"]["split"],
        "max_samples": document.get("config", {}).get("max_samples"),
        "list of templates": zero_shot.get("templates"),
        **{key: value for task in tasks for key, value in compare_models.predicted_by(document, task).items()},
    }


def _short(value: Any) -> str:
    """Digests and lists of templates cut; who predicts is told apart by the end of a path."""
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
