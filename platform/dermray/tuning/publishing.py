"""What the trials of a sweep say together: leaderboard, best recipe, importance of parameters, and a page of it all."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dermray import documents, ledger, storage
from dermray.redaction import without_secrets
from dermray.reporting import sweep_page
from dermray.train import worker
from dermray.tuning import importance, records
from dermray.tuning.plan import show
from dermray.tuning.records import AnyTrial, Status, TrialRecord
from dermray.tuning.settings import SweepConfig
from dermray.tuning.space import LogUniform

BEST_NAME = "best.yaml"
TRIALS_NAME = "trials.json"
PAGE_NAME = "sweep.html"


@dataclass(frozen=True)
class SweepResult:
    """What a finished sweep leaves.

    Attributes:
        records: of all trials, best first.
        leaderboard: the same as a text table.
        best_uri: YAML of the best trial's recipe.
        trials_uri: JSON of all trials.
        page_uri: the report.
    """

    best: AnyTrial
    records: list[TrialRecord]
    leaderboard: str
    best_uri: str
    trials_uri: str
    page_uri: str
    value: float
    trials: Mapping[str, AnyTrial]

    def metrics(self) -> dict[str, float]:
        """Figures of the whole sweep; `samples_share` is of what the trials that were begun would have cost in full."""
        counts = {f"trials_{status}": 0.0 for status in Status if status is not Status.UNFINISHED}
        for record in self.records:
            counts[f"trials_{record.status}"] += 1
        full = sum(trial.samples_at(trial.num_steps) for trial in self.trials.values())
        trained = sum(record.samples_trained for record in self.records)
        # Evaluations train on none.
        cost = {"samples_trained": trained, "samples_share": trained / full} if full else {}
        return {"best_objective": self.value, **cost, **counts}


def publish(
    config: SweepConfig, trials: Mapping[str, AnyTrial], found: Sequence[TrialRecord], *, seconds: float
) -> SweepResult:
    """Write `best.yaml`, `trials.json` and `sweep.html` into the sweep's output.

    Args:
        trials: that were begun, by name.
        found: their records.
        seconds: that this call of the sweep took.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        DermRayError: no trial ran to its end.
    """
    best_record = records.best_of(found, config.objective, config.mode)
    best, value = trials[best_record.name], best_record.value(config.objective)
    assert value is not None
    ordered = records.ranked(found, config.objective, config.mode)
    result = SweepResult(
        best=best,
        records=ordered,
        leaderboard=records.leaderboard(found, config.objective, config.mode),
        best_uri=storage.join(config.output, BEST_NAME),
        trials_uri=storage.join(config.output, TRIALS_NAME),
        page_uri=storage.join(config.output, PAGE_NAME),
        value=value,
        trials=trials,
    )
    document = {
        "objective": config.objective,
        "mode": config.mode,
        "best": best.name,
        "search": config.search,
        "scheduler": config.scheduler.kind,
        "seconds": round(seconds, 1),
        **result.metrics(),
        "settings": [asdict(setting) for setting in records.over_seeds(found, config.objective, config.mode)]
        if records.SEED_KEY in config.space
        else None,
        "importance": importance.of_parameters(config, found),
        "trials": [_describe(trials[record.name], record, config.objective) for record in ordered],
    }
    with ledger.claim(config.output) as claim:
        claim.write_together(
            {
                result.best_uri: _header(config, result, best_record) + best.recipe_yaml(),
                result.page_uri: sweep_page.render(document, _scales(config), _recipe_of(config)),
                result.trials_uri: documents.json_text(document),
            }
        )
    return result


def _header(config: SweepConfig, result: SweepResult, record: TrialRecord) -> str:
    corpus = shlex.quote(f"corpus={_corpus_of(config)}")
    lines = [
        f"# {record.name}, the best of {len(result.records)} trials: {config.objective} {result.value:.4f} "
        f"({result.best.label()})",
        f"#   python jobs/{config.job}.py --config THIS_FILE {corpus} output=URI",
    ]
    if config.scheduler.kind == "pbt":
        lines.append("# These are its last settings. The population came to its weights by changing them on the way:")
        lines.append(f"# the model itself is {storage.join(result.best.uri, worker.MODEL_FOLDER)}")
    return "\n".join(lines) + "\n"


def _corpus_of(config: SweepConfig) -> str:
    """The key `corpus` as the command line takes it; of several corpora each with its weight, if they have some."""
    corpus = config.recorded(include={"corpus"})["corpus"]
    if isinstance(corpus, str):
        return corpus
    return show([share if share["weight"] is not None else share["uri"] for share in corpus])


def _scales(config: SweepConfig) -> dict[str, bool]:
    """Parameters of the space, and whether each is spread over orders of magnitude."""
    return {key: isinstance(parameter, LogUniform) for key, parameter in config.space.items()}


def _recipe_of(config: SweepConfig) -> str:
    return storage.name_of(config.recipe).removesuffix(".yaml") if config.recipe else f"jobs/{config.job}.py"


def _describe(trial: AnyTrial, record: TrialRecord, objective: str) -> dict[str, Any]:
    return {
        "name": trial.name,
        "status": str(record.status),
        "params": trial.params,
        "drawn": record.params,
        "exploits": [asdict(exploit) for exploit in record.exploits],
        objective: record.value(objective),
        "samples_trained": record.samples_trained,
        "samples_in_full": trial.samples_at(trial.num_steps),
        "num_failures": record.num_failures,
        "num_steps": trial.num_steps,
        "curve": [
            {"validation": p.validation, "step": p.step, "samples": p.samples, **p.metrics} for p in record.curve
        ],
        "error": without_secrets(record.error),
        "output": trial.uri,
        "config": trial.config.recorded(),
    }
