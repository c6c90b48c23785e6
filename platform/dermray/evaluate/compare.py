"""Is one model better than another? A paired bootstrap over the predictions of both on the same samples.

Both models are scored on the very same resamples (stratified by label, as their own intervals are), so what makes a
sample hard for both cancels out, and the interval of the difference is narrower than the two intervals suggest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from dermray import scales, storage
from dermray.errors import EvaluationError
from dermray.evaluate import predictions, retrieval
from dermray.evaluate.concepts import area_distributions
from dermray.evaluate.predictions import (
    ClassPredictions,
    ConceptPredictions,
    Origin,
    OwnPredictions,
    Predictions,
    RetrievalPredictions,
)
from dermray.evaluate.predictors import kinds as predictors
from dermray.evaluate.statistics import metrics
from dermray.evaluate.statistics.bootstrap import Distribution
from dermray.evaluate.statistics.paired import Difference, differences
from dermray.evaluate.tasks import contract, kinds

REPORT_NAME = "report.json"


def compare(
    baseline: Predictions, candidate: Predictions, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Compare two models' predictions of the same kind on the same samples.

    Args:
        baseline: of one model.
        candidate: of the other.
        bootstrap: resamples of the stratified bootstrap, the same for both; 0 leaves intervals and p-values out.
        seed: of the bootstrap.

    Returns:
        The scores of `dermray.evaluate.metrics.classification`, `retrieval_metrics` or `mean_auroc`, or those of the
        task that scores `OwnPredictions`, by name → `Difference`.

    Raises:
        EvaluationError: they are of other samples, labels, classes or kinds; the message says what differs.
    """
    _check_alike(baseline, candidate)
    scores = [distributions(one, bootstrap=bootstrap, seed=seed) for one in (baseline, candidate)]
    return differences(scores[0], scores[1])


def compare_reports(
    baseline_uri: str, candidate_uri: str, task: str, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """`compare` on the saved predictions of one task in two reports of jobs/evaluate.py.

    Raises:
        EvaluationError: a report or its predictions are not there, or they are of other corpora, splits or samples.
    """
    saved = [load(uri, read_report(uri), task) for uri in (baseline_uri, candidate_uri)]
    check_origins(baseline_uri, saved[0][1], candidate_uri, saved[1][1])
    return compare(saved[0][0], saved[1][0], bootstrap=bootstrap, seed=seed)


def read_report(uri: str) -> dict[str, Any]:
    """The `report.json` in the folder `uri`: that of one data set, or of a suite of benchmarks.

    Raises:
        EvaluationError: there is none, or it is damaged.
    """
    file = storage.join(uri, REPORT_NAME)
    try:
        document = storage.read_object(file)
    except FileNotFoundError:
        raise EvaluationError(f"{file} does not exist; run jobs/evaluate.py with output={uri}") from None
    return document if "benchmarks" in document else whole(document, file)


def whole(document: Any, file: str) -> dict[str, Any]:
    """The report of one data set, checked as far as it is read again.

    Raises:
        EvaluationError: it is none, or is damaged.
    """
    parts = [document.get(name) for name in ("model", "corpus", "tasks")] if isinstance(document, dict) else [None]
    is_report = all(isinstance(part, dict) for part in parts) and "model_digest" in document["model"]
    if not is_report or not all(
        isinstance(section, dict) and isinstance(section.get("metrics"), dict) for section in document["tasks"].values()
    ):
        raise EvaluationError(f"{file} is no report of jobs/evaluate.py, or is damaged; evaluate again")
    return dict(document)


def load(uri: str, document: Mapping[str, Any], task: str) -> tuple[Predictions, Origin]:
    """The saved predictions of a task in the report at `uri`, whose `report.json` is `document`.

    Raises:
        EvaluationError: they are not there, or are those of another evaluation than the document.
    """
    path = document["tasks"].get(task, {}).get("predictions")
    if path is None:
        known = ", ".join(name for name, section in document["tasks"].items() if section.get("predictions"))
        raise EvaluationError(f"{uri} has no predictions of {task}; it has those of: {known or 'none'}")
    found, origin = predictions.read(storage.inside(uri, path))
    if (origin.model_digest, origin.corpus_digest) != (
        document["model"]["model_digest"],
        document["corpus"]["digest"],
    ):
        raise EvaluationError(
            f"{storage.join(uri, path)} is of another model or corpus than {REPORT_NAME} beside it; "
            "a later evaluation was broken off there: run it again"
        )
    return found, origin


def predicted_by(document: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Who predicted for a task of a report, and with which keys, as a run names them.

    Returns:
        `predictor.TASK` → name, empty where the task asks nobody, and `predictor_keys.TASK.KEY` → value. A report of an
        earlier build that names nobody has the task's own predictor.
    """
    config, section = document.get("config", {}), document["tasks"][task]
    name = section.get("predictor") or config.get("predictor", {}).get(task) or _own_predictor(task)
    keys = config.get("predictor_keys", {}).get(task, {})
    return {f"predictor.{task}": name, **{f"predictor_keys.{task}.{key}": value for key, value in keys.items()}}


def options_of(document: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What decides the scores of a task of a report beside model, data and predictor.

    Returns:
        `KEY of TASK` → value. Of a report of an earlier build those of our own tasks' keys that its `config` tells;
        before there was a `probe_cost` it was 1.
    """
    section = document["tasks"][task]
    told = section.get("options")
    if told is None:
        config = {"probe_cost": 1.0} | document.get("config", {})
        keys = _own_deciding(task, predicted_by(document, task)[f"predictor.{task}"])
        told = {key: config[key] for key in keys if key in config and (key != "templates" or key not in section)}
    return {f"{key} of {task}": value for key, value in told.items()}


def _own_deciding(task: str, predictor: str) -> tuple[str, ...]:
    # Of our own alone: nothing is imported because a report names it.
    if task not in kinds.ours():
        return ()
    return kinds.deciding(kinds.find(task), predictors.find(predictor) if predictor in predictors.ours() else None)


def _own_predictor(task: str) -> str:
    # By the short name: nothing is imported because a report names it.
    try:
        return kinds.find(kinds.short(task)).predictor
    except ValueError:
        return ""


def check_origins(baseline_uri: str, baseline: Origin, candidate_uri: str, candidate: Origin) -> None:
    """Refuse two evaluations that did not score the same thing.

    Raises:
        EvaluationError: the task, the corpus or table, or the split differs.
    """
    for name, said in (("task", "task"), ("corpus_digest", "corpus digest"), ("split", "split")):
        one, other = getattr(baseline, name), getattr(candidate, name)
        if one != other:
            raise EvaluationError(
                f"{baseline_uri} and {candidate_uri} are not comparable: the {said} is {one} and {other}; "
                "evaluate both models on the same data"
            )


def distributions(found: Predictions, *, bootstrap: int, seed: int) -> dict[str, Distribution]:
    """The scores of some predictions on the samples and on each resample."""
    if isinstance(found, ClassPredictions):
        return metrics.distributions(found.probabilities, found.labels, bootstrap=bootstrap, seed=seed)
    if isinstance(found, OwnPredictions):
        return _own_distributions(found, bootstrap=bootstrap, seed=seed)
    if isinstance(found, ConceptPredictions):
        mean, _ = area_distributions(found.scores, found.marks, bootstrap=bootstrap, seed=seed)
        return {"mean_auroc": mean}
    scores: dict[str, Distribution] = {}
    for direction in scales.RETRIEVAL_WAYS:
        ranks = retrieval.Ranks(getattr(found, f"{direction}_higher"), getattr(found, f"{direction}_tied"))
        scores |= retrieval.rank_distributions(ranks, direction, retrieval.DEFAULT_KS, bootstrap=bootstrap, seed=seed)
    return scores


def _own_distributions(found: OwnPredictions, *, bootstrap: int, seed: int) -> dict[str, Distribution]:
    """By the task itself, which must be found by the name that it was run by."""
    try:
        task = contract.scorer(found.scored_by)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    return cast(contract.ComparableTask, task).distributions(found, bootstrap=bootstrap, seed=seed)


def _check_alike(baseline: Predictions, candidate: Predictions) -> None:
    if type(baseline) is not type(candidate):
        raise EvaluationError(
            f"predictions of other kinds cannot be compared: {type(baseline).__name__} and {type(candidate).__name__}"
        )
    one, other = list(baseline.sample_ids), list(candidate.sample_ids)
    if one != other:
        row = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        where = f"; the first that differs is number {row}: {one[row]} and {other[row]}" if row is not None else ""
        raise EvaluationError(
            f"the predictions are not of the same samples in the same order: {len(one)} and {len(other)}{where}"
        )
    same: tuple[tuple[str, Any, Any], ...] = ()
    if isinstance(baseline, ClassPredictions) and isinstance(candidate, ClassPredictions):
        same = (
            ("classes", baseline.classes, candidate.classes),
            ("labels", baseline.labels, candidate.labels),
            ("settings", baseline.setting, candidate.setting),
        )
    elif isinstance(baseline, ConceptPredictions) and isinstance(candidate, ConceptPredictions):
        same = (("concepts", baseline.concepts, candidate.concepts), ("marks", baseline.marks, candidate.marks))
    elif isinstance(baseline, OwnPredictions) and isinstance(candidate, OwnPredictions):
        names = dict.fromkeys([*baseline.truth, *candidate.truth])
        same = (
            ("tasks", baseline.scored_by, candidate.scored_by),
            *((f"true {name}", baseline.truth.get(name), candidate.truth.get(name)) for name in names),
        )
    else:
        assert isinstance(baseline, RetrievalPredictions)
    for name, before, after in same:
        if not np.array_equal(before, after):
            raise EvaluationError(f"the predictions have other {name}; evaluate both models on the same data")
