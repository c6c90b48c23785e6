"""A sweep whose trials are evaluations of one model: keys of `jobs/evaluate.py` are chosen by a validation split.

The vectors are computed once, by the first trial; the others find them in the cache. Trials therefore follow each other
in the driver and need no Ray Tune. Records, proposals, report and resumption are those of every sweep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from dermray import documents, interrupts, ledger, models, redaction, storage, tracking
from dermray.config import TrackingConfig
from dermray.corpus.manifest import Manifest
from dermray.errors import ClaimError, ConfigError, DermRayError, EvaluationError, StoppedError
from dermray.evaluate import compare, suite
from dermray.evaluate.cases import TEST
from dermray.evaluate.report import JSON_NAME
from dermray.evaluate.settings import EvaluateConfig
from dermray.model_uri import folder_uri
from dermray.models import layout
from dermray.progress import Progress
from dermray.tuning import plan, proposals
from dermray.tuning.basis import Basis
from dermray.tuning.publishing import SweepResult, publish
from dermray.tuning.records import Point, Status, TrialRecord
from dermray.tuning.settings import OWN_KEYS_OF_EVALUATIONS, SweepConfig

# Keys that say where things lie and how the work is shared out; all others may have a say in the scores. Corpus and
# model decide by what they hold.
LEAVES_SCORES = (
    *("corpus", "model", "output", "cache", "batch_size", "num_actors", "wait_for_output_s", "run_name"),
    *("cluster", "tracking"),
)
# Before the digest of a model's weights.
WEIGHTS = "weights "


@dataclass(frozen=True)
class EvaluationTrial:
    """One point of the space; `config` is the evaluation that runs, `basis` what its scores follow from."""

    name: str
    params: dict[str, Any]
    config: EvaluateConfig
    basis: Basis
    num_steps: int = 1

    @property
    def uri(self) -> str:
        """The trial's own folder."""
        return self.config.output

    def samples_at(self, step: int) -> int:
        """None: an evaluation does not train."""
        return 0

    def label(self) -> str:
        """What was drawn, for humans."""
        return plan.label(self.params)

    def recipe_yaml(self) -> str:
        """The trial as a file that `jobs/evaluate.py --config` takes; corpus and output are left to the caller."""
        tree = self.config.recorded(exclude=set(OWN_KEYS_OF_EVALUATIONS))
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def plan_evaluations(config: SweepConfig) -> list[EvaluationTrial]:
    """Draw and check all trials.

    Raises:
        ConfigError: an override or a drawn value is not what evaluation takes, or a test split would choose.
        CorpusError, ModelError: corpus, split or model are not there.
        DermRayError: the output holds a trial of another draw, corpus, model or other settings; names its record.
    """
    points = plan.points_so_far(config)
    found = [_configured(config, number, params) for number, params in enumerate(points)]
    model = tracking.resolve_model(found[0].model, config.tracking)
    suite.check_inputs(found[0], model_uri=model.folder_uri)
    inputs = Inputs(config)
    trials = [inputs.trial(params, one) for params, one in zip(points, found, strict=True)]
    for trial in trials:
        if TrialRecord.load(trial).basis is None:
            _compare_report(trial)
    return trials


def _compare_report(trial: EvaluationTrial) -> None:
    """Refuse what an earlier version scored on something else, as far as its report says so."""
    try:
        report = compare.read_report(trial.uri)
    except EvaluationError:
        # None, or a damaged one: there is nothing to compare.
        return
    now, file = trial.basis.settings, storage.join(trial.uri, JSON_NAME)
    told = documents.as_object(report.get("config", {}), f"config of {file}")
    # A report has the tasks that were meant where none are given, and the model by the name that it had.
    settings = now | {key: told[key] for key in (now.keys() & told.keys()) - {"tasks", "model"}}
    if now["model"].startswith(WEIGHTS):
        settings["model"] = f"{WEIGHTS}{report['model']['model_digest']}"
    before = Basis(str(report["corpus"].get("digest")), settings)
    if found := before.differences(trial.basis):
        raise DermRayError(
            f"{file} is of something else: {found}; give the sweep another output, or what it began with"
        )


class Inputs:
    """The corpus and the models of a sweep of evaluations, by what they hold; each is read once."""

    def __init__(self, config: SweepConfig) -> None:
        """Read the corpus's manifest.

        Raises:
            CorpusError: it is not there, or malformed.
        """
        (uri,) = config.corpus_uris
        self._corpus_digest = Manifest.load(uri).digest
        self._tracking = config.tracking
        self._models: dict[str, str] = {}
        self._space = config.proposed_from

    def trial(self, params: dict[str, Any], config: EvaluateConfig) -> EvaluationTrial:
        """The trial at a point of the space whose evaluation is `config`.

        Raises:
            TrackingError, ModelError: no such model.
        """
        if config.model not in self._models:
            self._models[config.model] = _model(config.model, self._tracking)
        settings = {"model": self._models[config.model], **config.model_dump(mode="json", exclude=set(LEAVES_SCORES))}
        basis = Basis(self._corpus_digest, redaction.hidden(settings), self._space)
        return EvaluationTrial(storage.name_of(config.output), params, config, basis)


def _model(uri: str, config: TrackingConfig) -> str:
    """A model by its weights, wherever they lie; by its name where it has no file of them."""
    name = models.located(tracking.resolve_model(uri, config).folder_uri)
    weights = layout.weights_of(name) if folder_uri(name) else None
    return name if weights is None else f"{WEIGHTS}{storage.sha256(storage.join(name, weights))}"


def _configured(config: SweepConfig, number: int, params: dict[str, Any]) -> EvaluateConfig:
    name = plan.trial_name(number)
    own = {"corpus": config.corpus, "output": plan.trial_uri(config.output, name)}
    found = plan.parsed(EvaluateConfig, config.recipe, {**config.overrides, **params, **own})
    if found.split == TEST:
        raise ConfigError(f"split: a sweep chooses by the scores of its split; keep {TEST!r} for what is chosen")
    return found.model_copy(update={"run_name": name, "cluster": config.cluster, "tracking": config.tracking})


def sweep(
    config: SweepConfig, trials: list[EvaluationTrial], *, parent_key: str | None, say: Callable[[str], None]
) -> SweepResult:
    """Evaluate every trial that has no score yet; needs a connected Ray cluster.

    Args:
        trials: from `plan_evaluations`.
        parent_key: key of the MLflow run in which theirs are nested.
        say: gets a line for each trial.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        DermRayError: the objective is not among the scores, or no trial came to its end.
    """
    with ledger.claim(config.output, wait_s=config.wait_for_output_s) as claim:
        return _sweep(config, trials, claim, parent_key=parent_key, say=say)


def _sweep(
    config: SweepConfig,
    trials: list[EvaluationTrial],
    claim: ledger.Claim,
    *,
    parent_key: str | None,
    say: Callable[[str], None],
) -> SweepResult:
    started = time.monotonic()
    begun: dict[str, EvaluationTrial] = {}
    records: dict[str, TrialRecord] = {}
    num_left = sum(not TrialRecord.load(trial).status.is_final for trial in trials)
    inputs = Inputs(config)
    with Progress("sweep", num_left, "trials", say=say) as progress:
        for number, planned in enumerate(trials):
            if config.max_hours is not None and (time.monotonic() - started) / 3600 >= config.max_hours:
                break
            trial = _at_its_point(config, inputs, number, planned, list(records.values()))
            begun[trial.name], records[trial.name] = trial, TrialRecord.load(trial)
            if not records[trial.name].status.is_final:
                _run(config, trial, records[trial.name], claim, parent_key)
                progress.advance()
            elif records[trial.name].curve:
                _require_objective(config.objective, records[trial.name].curve[-1].metrics)
            said = records[trial.name].error or f"{config.objective} {records[trial.name].value(config.objective):.4f}"
            say(f"{trial.name} of {len(trials)}  {trial.label()}  {said}")
    return publish(config, begun, list(records.values()), seconds=time.monotonic() - started)


def _at_its_point(
    config: SweepConfig, inputs: Inputs, number: int, planned: EvaluationTrial, records: list[TrialRecord]
) -> EvaluationTrial:
    """The trial itself, or with `search=tpe` at the point that was or is proposed for it."""
    if config.search != "tpe":
        return planned
    params = TrialRecord.params_at(planned.uri) or proposals.proposal(config, number, records)
    return planned if params is None else inputs.trial(params, _configured(config, number, params))


def _run(
    config: SweepConfig, trial: EvaluationTrial, record: TrialRecord, claim: ledger.Claim, parent_key: str | None
) -> None:
    """Evaluate; a trial that fails costs itself, never the sweep."""
    claim.confirm()
    record.save(trial)
    try:
        scores = _evaluate(trial, claim, parent_key)
    except (StoppedError, ClaimError):
        raise
    except DermRayError as error:
        if interrupts.loss() is not None:
            raise
        claim.confirm()
        record.status, record.error = Status.FAILED, " ".join(str(error).split())
        record.save(trial)
        return
    _require_objective(config.objective, scores)
    claim.confirm()
    record.curve = [Point(1, 1, 0, scores)]
    record.status, record.error = Status.FINISHED, ""
    record.save(trial)


def _require_objective(objective: str, scores: dict[str, float]) -> None:
    if objective not in scores:
        raise DermRayError(f"objective: no score {objective!r}; there are {', '.join(sorted(scores))}")


def _evaluate(trial: EvaluationTrial, claim: ledger.Claim, parent_key: str | None) -> dict[str, float]:
    config = trial.config
    model = tracking.resolve_model(config.model, config.tracking)
    with tracking.run(
        config.tracking,
        kind="trial",
        name=trial.name,
        resolved=config,
        state_uri=storage.join(trial.uri, "mlflow.json"),
        parent_key=parent_key,
    ) as current:
        report = suite.evaluate(config, model_uri=model.folder_uri)
        claim.confirm()
        report.save(config.output)
        tracking.log_evaluation(current, report.scored, report.document["model"], config.output, JSON_NAME)
        scores = report.metrics()
        current.log_metrics(scores)
    return scores
