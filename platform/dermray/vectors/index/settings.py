"""The keys of `jobs/embed.py` and `jobs/index.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dermray.config import ClusterConfig, Config, TrackingConfig, Uri
from dermray.ledger import WaitForOutput


class EmbedConfig(Config):
    """Which model embeds which part of which corpus, and how the work is spread."""

    model: str = Field(description="model folder (path or URI), models:/NAME@ALIAS, or an open_clip name")
    corpus: Uri = Field(description="folder or URI of the prepared corpus")
    output: Uri = Field(description="folder or URI of the embeddings")
    splits: list[str] | None = Field(None, min_length=1, description="splits to embed; empty: all")
    captions: bool = Field(True, description="also embed the captions, for image to text search")
    thumbnail_side: int = Field(
        112, ge=0, le=512, description="shorter side of the small JPEGs kept for search results; 0: none"
    )
    rows_per_part: int = Field(2048, ge=1, description="samples of one Parquet part")
    cache: str | None = Field(
        None,
        description="URI of the folder that keeps vectors, for later runs and evaluations, shared by all nodes; "
        "empty: $DERMRAY_CACHE/features, else ~/.cache/dermray/features",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the towers")
    batch_size: int = Field(64, ge=1, description="images or texts per forward pass; changes no vector")
    num_actors: int | None = Field(
        None, ge=1, description="encoders at work; empty: one per GPU, else one per two logical CPUs"
    )
    replace: bool = Field(False, description="true: other embeddings that are in output are removed first")
    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _apart(self) -> EmbedConfig:
        if self.output == self.corpus:
            raise ValueError("output: must be another folder than corpus")
        return self

    def content(self) -> dict[str, Any]:
        """The keys that, with the model and the corpus, decide what is written."""
        return self.model_dump(mode="json", include={"splits", "captions", "thumbnail_side", "rows_per_part"})


class IndexConfig(Config):
    """Which embeddings are indexed, and how."""

    embeddings: Uri = Field(description="folder or URI that jobs/embed.py wrote")
    output: Uri = Field(description="folder or URI of the index")
    exact_below: int = Field(
        100_000, ge=0, description="up to this many vectors every one is compared; beyond, an approximate graph (HNSW)"
    )
    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    tracking: TrackingConfig = TrackingConfig()
