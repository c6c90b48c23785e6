"""A population handed to Tune generation by generation; between two of them poor trials take good ones' checkpoints.

The truth is in the folders: a trial has come to the end of a generation when its checkpoint of that step is committed,
and a generation is closed when its decisions are written. A sweep that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from dermray.ingest.corpora import Corpora
from dermray.train import checkpoint, epochs
from dermray.tuning import population
from dermray.tuning.plan import Trial
from dermray.tuning.population import Member
from dermray.tuning.queues import StatelessSearcher, TrialRegister, moved
from dermray.tuning.records import Exploit, Point, Status, TrialRecord
from dermray.tuning.reports import LEG, NAME
from dermray.tuning.settings import SweepConfig


class Generations(StatelessSearcher):
    """Hands out each trial once a generation, as a leg of its training that ends with a pause."""

    def __init__(self, config: SweepConfig, trials: list[Trial], corpora: Corpora, register: TrialRegister) -> None:
        """Take up the population where its folders say it is.

        Raises:
            DermRayError: a folder holds a trial of another sweep.
        """
        super().__init__(config)
        self._config = config
        self._corpora = corpora
        self._register = register
        self._pauses = population.pauses(config.scheduler.perturbation_interval, trials[0])
        self.num_legs = len(trials) * (len(self._pauses) + 1)
        self._trials = {trial.name: trial for trial in trials}
        self._records = {trial.name: TrialRecord.load(trial) for trial in trials}
        self._under_way: dict[str, str] = {}
        self._generation = 1
        while (decided := population.load(config.output, self._generation)) is not None:
            self._close(decided)
        self._waiting = self._unfinished()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next leg; None while those of this generation are under way; or that the population is at its end."""
        if self._register.interrupted:
            return None if self._under_way else Searcher.FINISHED
        while not self._waiting and not self._under_way and self._generation <= len(self._pauses):
            self._decide()
            self._waiting = self._unfinished()
        if not self._waiting:
            return None if self._under_way else Searcher.FINISHED
        name = self._waiting.pop(0)
        record = self._records[name]
        if not record.status.is_final:
            record.status, record.error = Status.UNFINISHED, ""
        trial = replace(self._trials[name], pause_at=self._pause)
        self._register.begin(trial, record)
        self._under_way[trial_id] = name
        return {NAME: name, LEG: self._generation, **trial.params}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A leg has ended, well or not."""
        del self._under_way[trial_id]

    @property
    def _pause(self) -> int | None:
        return self._pauses[self._generation - 1] if self._generation <= len(self._pauses) else None

    def _unfinished(self) -> list[str]:
        """Trials that this generation still waits for; in the last one all, so that the ledger hears of each."""
        pause = self._pause
        return [name for name in self._trials if pause is None or self._at(name, pause) is None]

    def _at(self, name: str, step: int) -> checkpoint.CheckpointInfo | None:
        """A trial's checkpoint of a step, if that is where it pauses."""
        found = checkpoint.committed(self._trials[name].uri)
        return found[-1] if found and found[-1].step == step else None

    def _decide(self) -> None:
        step = self._pause
        assert step is not None
        members = [self._member(name, step) for name in self._trials]
        decided = population.exploits(self._config, members, generation=self._generation, step=step)
        self._register.confirm()
        population.save(self._config.output, self._generation, decided)
        self._close(decided)

    def _member(self, name: str, step: int) -> Member:
        info, trial, record = self._at(name, step), self._trials[name], self._records[name]
        if info is None:
            return Member(name, trial.params, None)
        validation = trial.validation_of(step)
        if record.value_at(validation, self._config.objective) is None and self._config.objective in info.scores:
            # The sweep was killed between the checkpoint and the news of it.
            self._register.confirm()
            record.add(Point(validation, step, trial.samples_at(step), dict(info.scores)))
            record.save(trial)
        return Member(name, trial.params, record.value_at(validation, self._config.objective), info.sha256)

    def _close(self, decided: Sequence[Exploit]) -> None:
        """Carry out what was decided, as far as that is not done; no donor has gone on before all is."""
        for exploit in decided:
            self._carry_out(exploit)
        self._generation += 1

    def _carry_out(self, exploit: Exploit) -> None:
        """Copy the checkpoint, then the record: what was interrupted between the two is done again."""
        record = self._records[exploit.name]
        trial = moved(self._config, self._trials[exploit.name], exploit.params, self._corpora)
        if exploit not in record.exploits:
            donor = self._at(exploit.donor, exploit.step)
            self._register.confirm()
            assert donor is not None, f"{exploit.donor} has left step {exploit.step} before its checkpoint was copied"
            checkpoint.adopt(
                donor,
                trial.uri,
                trajectory=epochs.trajectory(trial.config, self._corpora),
                corpus_digest=self._corpora.digest,
                sha256=exploit.sha256,
            )
            record.exploits.append(exploit)
            record.status, record.error = Status.UNFINISHED, ""
            record.save(trial)
        self._trials[exploit.name] = trial
