"""What Tune asks for the next trial: one after the other, until the budget is used up."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Protocol

from ray.tune.search import Searcher

from dermray import storage
from dermray.ingest.corpora import Corpora
from dermray.train import pretrain
from dermray.tuning import proposals
from dermray.tuning.plan import Trial, with_params
from dermray.tuning.records import TrialRecord
from dermray.tuning.reports import NAME
from dermray.tuning.settings import SweepConfig


class TrialRegister(Protocol):
    """Where trials that begin are written down, until the sweep is `interrupted`; the sweep's ledger."""

    records: dict[str, TrialRecord]
    interrupted: bool

    def begin(self, trial: Trial, record: TrialRecord | None = None) -> None:
        """A trial is to start, or to go on."""

    def confirm(self) -> None:
        """The last look before something is written into the sweep's output; raises where another run has it."""


class StatelessSearcher(Searcher):
    """A searcher of which Tune keeps nothing: a sweep that is started again reads its trials' folders."""

    def __init__(self, config: SweepConfig) -> None:
        super().__init__(metric=config.objective, mode=config.mode)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger keeps what a trial came to."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""
        storage.write_text(checkpoint_path, "")

    def restore(self, checkpoint_path: str) -> None:
        """Never called: Tune always starts afresh."""


class Queue(StatelessSearcher):
    """Hands the trials to Tune one by one, as places for them become free, until the budget is used up."""

    def __init__(self, config: SweepConfig, trials: list[Trial], corpora: Corpora, register: TrialRegister) -> None:
        """Hand out `trials` in their order; with `search=tpe` the later ones at the points that are proposed then."""
        super().__init__(config)
        self.num_legs = len(trials)
        self._config = config
        self._waiting = list(enumerate(trials))
        self._corpora = corpora
        self._register = register
        self._begun_at = time.monotonic()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, or that there is none."""
        if self._register.interrupted or not self._waiting or self._is_used_up(self._waiting[0][1]):
            return Searcher.FINISHED
        number, trial = self._waiting.pop(0)
        trial = self._at_its_point(number, trial)
        self._register.begin(trial)
        return {NAME: trial.name, **trial.params}

    def _at_its_point(self, number: int, trial: Trial) -> Trial:
        if self._config.search != "tpe":
            return trial
        params = TrialRecord.params_at(trial.uri)
        if params is None:
            params = proposals.proposal(self._config, number, list(self._register.records.values()))
        return trial if params is None else moved(self._config, trial, params, self._corpora)

    def _is_used_up(self, following: Trial) -> bool:
        """A trial that was begun before goes on all the same: its share of the budget is spent."""
        if TrialRecord.params_at(following.uri) is not None:
            return False
        config, records = self._config, self._register.records.values()
        spent = sum(record.samples_trained for record in records)
        if config.max_samples is not None and spent >= config.max_samples:
            return True
        hours = (time.monotonic() - self._begun_at) / 3600
        return config.max_hours is not None and hours >= config.max_hours


def moved(config: SweepConfig, trial: Trial, params: dict[str, Any], corpora: Corpora) -> Trial:
    """The trial at another point of the space, with absolute URIs: its process runs in a folder of its own."""
    other = with_params(config, trial, params, corpora)
    return replace(other, config=pretrain.located(other.config))
