"""The keys of `jobs/export.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dermray.config import ClusterConfig, Config, TrackingConfig, Uri
from dermray.corpus.schema import PAIR_ASPECTS, CaptionAspect
from dermray.ledger import WaitForOutput

ExportFormat = Literal["webdataset", "open_clip_csv", "parquet", "make_table", "instruct"]


class ExportConfig(Config):
    """Everything that decides what an export holds, and how the work is spread."""

    corpus: Uri = Field(description="folder or URI of the prepared corpus")
    output: Uri = Field(description="folder or URI of the export")
    format: ExportFormat = Field(
        description="webdataset: tars as img2dataset's; open_clip_csv: tables and image files; "
        "parquet: as Hugging Face's datasets; make_table: MAKE's training tables and image files; "
        "instruct: questions and answers as LLaVA's, and image files"
    )
    splits: list[str] | None = Field(None, min_length=1, description="splits to export; empty: all")
    aspects: list[CaptionAspect] = Field(
        list(PAIR_ASPECTS),
        min_length=1,
        description="captions that other programs see, the most wanted first; a sample's record always has all",
    )
    titles: Literal["each", "first"] = Field(
        "each", description="open_clip_csv: a row for each of those captions of an image, or for the first only"
    )
    samples_per_file: int = Field(
        10_000, ge=1, le=10**9, description="of a tar or Parquet file, or of a folder of images; and of a Ray task"
    )
    replace: bool = Field(False, description="true: another export that is in output is removed first")

    cpus_per_task: float = Field(1.0, gt=0, description="cores that a worker reserves")
    max_tasks: int | None = Field(None, ge=1, description="workers at the same time; empty: as many as fit the cluster")

    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _apart(self) -> ExportConfig:
        if self.output == self.corpus:
            raise ValueError("output: must be another folder than corpus")
        return self

    def without_effect(self) -> list[str]:
        """A line for each key that cannot do what it says."""
        given = self.model_fields_set
        unused = [name for name in ("titles",) if name in given and self.format != "open_clip_csv"]
        unused += [name for name in ("aspects",) if name in given and self.format == "make_table"]
        return [f"{name} has no effect with format={self.format}" for name in unused]

    def content(self) -> dict[str, Any]:
        """The keys that, with the corpus, decide every byte of the export."""
        return self.model_dump(mode="json", include={"format", "splits", "aspects", "titles", "samples_per_file"})
