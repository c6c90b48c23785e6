"""A sweep of the demo recipe over a corpus of 640 samples that is nowhere: for what needs no training."""

from __future__ import annotations

from pathlib import Path

from dermray.config import parse
from dermray.corpus.manifest import Manifest, Shard
from dermray.ingest.corpora import Corpora
from dermray.tuning.plan import Trial
from dermray.tuning.records import TrialRecord
from dermray.tuning.settings import SweepConfig
from tests.conftest import ROOT

OBJECTIVE = "validation_zero_shot_accuracy"
CORPORA = Corpora.of(
    "nowhere",
    Manifest(
        shards=(
            Shard(
                path="data/a.parquet", split="train", num_samples=640, num_bytes=1, sha256="0", row_groups=(32,) * 20
            ),
        )
    ),
)


def sweep_config(folder: Path, *arguments: str) -> SweepConfig:
    """The demo's space, with output and corpus in `folder`."""
    return parse(
        SweepConfig,
        [
            *("--config", str(ROOT / "tune/spaces/demo.yaml"), f"recipe={ROOT / 'jobs/configs/demo.yaml'}"),
            *(f"corpus={folder / 'corpus'}", f"output={folder / 'sweep'}", *arguments),
        ],
    )


class Notebook:
    """Stands for the sweep's ledger: keeps what is handed out, and writes the records that a ledger would."""

    interrupted = False

    def __init__(self) -> None:
        self.records: dict[str, TrialRecord] = {}
        self.trials: dict[str, Trial] = {}

    def begin(self, trial: Trial, record: TrialRecord | None = None) -> None:
        """A trial is to start, or to go on."""
        record = record or TrialRecord.load(trial)
        self.records[trial.name], self.trials[trial.name] = record, trial
        record.save(trial)

    def confirm(self) -> None:
        """Nobody else is there."""
