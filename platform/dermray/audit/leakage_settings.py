"""The keys of `jobs/leakage.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from dermray import storage
from dermray.config import ClusterConfig, Config, TrackingConfig, Uri
from dermray.corpus.schema import SPLIT_NAME, TRAIN
from dermray.corpus.shares import LocatedCorpora, uris_of
from dermray.ledger import WaitForOutput


class CorpusPart(NamedTuple):
    """A prepared corpus, or one split of it."""

    uri: str
    split: str | None

    @property
    def splits(self) -> tuple[str, ...] | None:
        """The one split, or None for all."""
        return None if self.split is None else (self.split,)

    @property
    def name(self) -> str:
        """`URI`, or `URI#split`."""
        return self.uri if self.split is None else f"{self.uri}#{self.split}"

    @property
    def short_name(self) -> str:
        """The last segment of the name."""
        return storage.name_of(self.name)


def corpus_part(text: str) -> CorpusPart:
    """`URI` or `URI#split` → a part; what follows a `#` and is no split name belongs to the URI."""
    uri, mark, split = text.rpartition("#")
    if mark and SPLIT_NAME.fullmatch(split):
        return CorpusPart(storage.normalise(uri), split)
    return CorpusPart(storage.normalise(text), None)


class LeakageConfig(Config):
    """What to compare with what, and how near is too near."""

    corpus: LocatedCorpora = Field(
        description="prepared corpus to train on, or several, as a pretraining names them; weights say nothing here"
    )
    against: tuple[str, ...] = Field(
        min_length=1, description="prepared corpora to evaluate on, [URI,URI,...]; URI#split: that split alone"
    )
    output: Uri = Field(description="folder or URI of the report, a folder of its own")
    splits: tuple[str, ...] = Field((TRAIN,), min_length=1, description="splits of each corpus that are trained on")
    max_distance: int = Field(
        6, ge=0, le=15, description="bits of 64 in which two perceptual hashes may differ to be a pair"
    )
    num_shown: int = Field(48, ge=0, le=1000, description="pairs that the report shows of each of against")
    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("against", "splits", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("against")
    @classmethod
    def _absolute_once_each(cls, against: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(corpus_part(text).name for text in against))

    @model_validator(mode="after")
    def _apart(self) -> LeakageConfig:
        for uri in self.corpus_uris:
            if corpus_part(uri).split is not None:
                raise ValueError(f"corpus: write splits=[{corpus_part(uri).split}] instead of URI#split")
        for part in self.parts():
            if part.uri in self.corpus_uris and (part.split is None or part.split in self.splits):
                raise ValueError(
                    f"against: {part.name} shares samples with the splits of corpus that are trained on "
                    f"({', '.join(self.splits)}); name another split, URI#split"
                )
            if self.output in (part.uri, *self.corpus_uris):
                raise ValueError("output: must be another folder than the corpora, as it is logged as a whole")
        return self

    @property
    def corpus_uris(self) -> tuple[str, ...]:
        """Where the training corpora are."""
        return uris_of(self.corpus)

    def parts(self) -> list[CorpusPart]:
        """What to compare with, in the given order."""
        return [corpus_part(text) for text in self.against]
