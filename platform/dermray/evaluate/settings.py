"""Keys of `jobs/evaluate.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dermray.config import ClusterConfig, Config, TrackingConfig

TaskName = Literal["zero_shot", "retrieval"]


class EvaluateConfig(Config):
    """What to score, on what, and how."""

    model: str = Field(description="model folder (path or URI), models:/NAME@ALIAS, or an open_clip name")
    corpus: str = Field(description="URI of a prepared corpus")
    output: str = Field(description="URI of the folder for report.json and report.html")
    split: str = Field("val", description="split of the corpus to score on")
    tasks: tuple[TaskName, ...] = Field(("zero_shot", "retrieval"), min_length=1, description="what to compute")
    templates: tuple[str, ...] = Field(
        (), description="zero-shot prompts, {} stands for the class name; empty: the eight published ones"
    )
    batch_size: int = Field(64, ge=1, description="images or texts per forward pass; changes no score")
    bootstrap: int = Field(1000, ge=0, description="resamples behind the 95 % intervals; 0: no intervals")
    seed: int = Field(0, ge=0, description="of the bootstrap and of the examples shown")
    num_actors: int | None = Field(
        None, ge=1, description="encoders at work; empty: one per GPU, else one per two logical CPUs"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: towers under autocast, for GPUs")
    max_samples: int | None = Field(
        None, ge=1, description="score only the first so many samples of the split; empty: all"
    )
    run_name: str | None = Field(None, description="name of the MLflow run; empty: MLflow picks one")
    cluster: ClusterConfig = Field(ClusterConfig(), description="which Ray cluster does the work")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where MLflow keeps the run")

    @field_validator("templates")
    @classmethod
    def _hold_the_class_name(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no {{}} for the class name")
        return templates

    @field_validator("tasks")
    @classmethod
    def _once_each(cls, tasks: tuple[TaskName, ...]) -> tuple[TaskName, ...]:
        return tuple(dict.fromkeys(tasks))
