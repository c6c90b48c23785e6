"""Keys of `jobs/evaluate.py` and `jobs/compare.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from dermray import storage
from dermray.config import ClusterConfig, Config, TrackingConfig
from dermray.corpus import spelling
from dermray.evaluate.predictors import kinds as predictors
from dermray.evaluate.predictors.kinds import PredictorConfig
from dermray.evaluate.tasks import kinds
from dermray.evaluate.tasks.kinds import TaskConfig, TaskName
from dermray.keys import Reader
from dermray.ledger import WaitForOutput

DEFAULT_TASKS = ("zero_shot", "retrieval")


class TableColumns(Config):
    """Column names of a table of one's own; a column named here must exist, a default name is used where it exists."""

    image: str = Field("image", description="path of the image: below the table's folder, or absolute")
    label: str = Field("label", description="class: a name, or a number that counts in classes=[...] from 0")
    caption: str = Field("caption", description="caption, for retrieval")
    split: str = Field("split", description="split of each row; without it all rows are scored")


class EvaluateConfig(Config):
    """What to score, on what, and how."""

    model: str = Field(description="model folder (path or URI), models:/NAME@ALIAS, or an open_clip name")
    corpus: str | None = Field(None, description="URI of a prepared corpus to score on")
    benchmark: str | None = Field(
        None, description="published benchmark to score on: a suite (derm1m) or one of it (derm1m/ham10000)"
    )
    data: str | None = Field(
        None,
        description="folder with a benchmark's data, published or prepared; or a table (.csv) of one's own",
    )
    output: str = Field(description="URI of the folder for report.json and report.html")
    split: str = Field("val", description="split of the corpus or table to score on; benchmarks bring their own")
    train_split: str = Field("train", description="split that linear_probe, knn and few_shot learn from")
    validation_split: str = Field("val", description="split that the temperature of the calibration is fitted on")
    tasks: tuple[TaskName, ...] = Field(
        (),
        description=f"what to compute: {', '.join(kinds.ours())}, the name of an installed package's task, or "
        f"package.module:NAME; empty: the benchmark's, else {' and '.join(DEFAULT_TASKS)}",
    )
    task: dict[str, SerializeAsAny[TaskConfig]] = Field(
        {}, description="keys of tasks of an installed package or of one's own, task.NAME.key=value"
    )
    predictor: dict[str, str] = Field(
        {},
        description=f"who predicts for a task, predictor.TASK=NAME: {', '.join(predictors.ours())}, the name of an "
        "installed package's predictor, or package.module:NAME; empty: the task's own",
    )
    predictor_keys: dict[str, SerializeAsAny[PredictorConfig]] = Field(
        {}, description="keys of who predicts for a task, predictor_keys.TASK.key=value"
    )
    columns: TableColumns = TableColumns()
    classes: tuple[str, ...] = Field((), description="class names of a table of one's own, in the order of its numbers")
    ontology: str | None = Field(
        None, description="disease tree for synonyms and hierarchical accuracy; empty: the corpus's own"
    )
    templates: tuple[str, ...] = Field(
        (), description="zero-shot prompts, {} stands for the class name; empty: the eight published ones"
    )
    label_fractions: tuple[float, ...] = Field(
        (0.01, 0.1, 1.0), min_length=1, description="shares of the training labels for linear_probe"
    )
    probe_cost: float = Field(
        1.0,
        gt=0,
        description="weakens the penalty of linear_probe: cost in units of the published one; choose it on val",
    )
    shots: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="training images a class for few_shot")
    num_draws: int = Field(5, ge=1, description="times that fewer labels are drawn, for linear_probe and few_shot")
    neighbours: int = Field(20, ge=1, description="training images that vote in knn")
    cache: str | None = Field(
        None,
        description="URI of the folder that keeps vectors for later runs, shared by all nodes; "
        "empty: $DERMRAY_CACHE/features, else ~/.cache/dermray/features",
    )
    batch_size: int = Field(64, ge=1, description="images or texts per forward pass; changes no score")
    bootstrap: int = Field(1000, ge=0, description="resamples behind the 95 % intervals; 0: no intervals")
    seed: int = Field(0, ge=0, description="of the bootstrap, of the shots drawn and of the examples shown")
    min_group_size: int = Field(
        20, ge=2, description="a skin type, sex, age, site or source with fewer samples is shown without a score"
    )
    leakage: str | None = Field(
        None, description="output of jobs/leakage.py: the report says which samples resemble training ones"
    )
    num_actors: int | None = Field(
        None, ge=1, description="encoders at work; empty: one per GPU, else one per two logical CPUs"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: towers under autocast, for GPUs")
    max_samples: int | None = Field(
        None, ge=1, description="score only the first so many samples of the split; empty: all"
    )
    wait_for_output_s: WaitForOutput = 0.0
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
        return kinds.named(tasks)

    @field_validator("label_fractions")
    @classmethod
    def _are_shares(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"a share of the labels lies above 0 and at most at 1, not at {fraction}")
        return tuple(dict.fromkeys(fractions))

    @field_validator("shots")
    @classmethod
    def _are_counts(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if min(shots) < 1:
            raise ValueError(f"few_shot needs at least one image a class, not {min(shots)}")
        return tuple(dict.fromkeys(shots))

    @field_validator("classes")
    @classmethod
    def _differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        spelled: dict[str, str] = {}
        for name in names:
            if spelling.is_placeholder(name):
                raise ValueError(f"the class name {name!r} says nothing, and no label is of that class")
            other = spelled.setdefault(spelling.key(name), name)
            if other == name and names.count(name) > 1:
                raise ValueError(f"the class name {name!r} is given more than once; each class needs its own")
            if other != name:
                raise ValueError(f"the class names {other!r} and {name!r} are one, as labels are compared")
        return names

    @model_validator(mode="after")
    def _one_thing_to_score_on(self) -> EvaluateConfig:
        if self.corpus is not None and (self.data is not None or self.benchmark is not None):
            raise ValueError("corpus: give either corpus=, or data= with or without benchmark=")
        if self.corpus is None and self.data is None:
            raise ValueError("corpus: give corpus=PREPARED, benchmark=NAME data=FOLDER, or data=TABLE.csv of your own")
        return self

    @field_validator("task", mode="before")
    @classmethod
    def _by_their_kinds(cls, sections: Any, info: ValidationInfo) -> dict[str, TaskConfig]:
        # `tasks` is not there where it was refused itself.
        return kinds.settings_of(info.data.get("tasks", ()), sections)

    @field_validator("predictor_keys", mode="before")
    @classmethod
    def _by_who_predicts(cls, sections: Any, info: ValidationInfo) -> dict[str, PredictorConfig]:
        known = info.data
        if "tasks" not in known or "predictor" not in known:
            return {}
        tasks = known["tasks"] or (DEFAULT_TASKS if known.get("corpus") else kinds.ours())
        return kinds.predictor_settings_of(tasks, known["predictor"], sections)

    @classmethod
    def prepared(cls, tree: Mapping[str, Any], reader: Reader) -> Mapping[str, Any]:
        """The sections of tasks and predictors by their own keys; an unknown one is told when it is validated."""
        return kinds.read_sections(tree, reader)

    @model_validator(mode="after")
    def _are_predicted_for(self) -> EvaluateConfig:
        # Where none are given, a benchmark or table decides which of ours there are.
        kinds.require_predictors(self.tasks or (DEFAULT_TASKS if self.corpus else kinds.ours()), self.predictor)
        return self

    def predictor_of(self, task: str) -> str:
        """Who predicts for a task, by the task's name or short name; empty: nobody, it works on vectors itself."""
        name = next((one for one in self.tasks if kinds.short(one) == task), task)
        return self.predictor.get(kinds.short(name)) or kinds.find(name).predictor

    def sees_vectors(self, tasks: Iterable[str]) -> bool:
        """Whether some of the tasks, or who predicts for them, look at vectors of the images."""
        return any(
            kinds.find(task).vectors or (named and predictors.find(named).vectors)
            for task in tasks
            for named in [self.predictor_of(task)]
        )

    def without_effect(self) -> list[str]:
        """A line for each key that the tasks at hand, or what is scored, do not use; a benchmark brings its tasks."""
        if self.benchmark is not None:
            unused = self._given("split", "classes", "columns")
            return [f"{key} has no effect with benchmark, which brings its own" for key in unused]
        unused = self._given("classes", "columns") if self.corpus else []
        lines = [f"{key} has no effect with a prepared corpus" for key in unused]
        used = {key for name in self.tasks or DEFAULT_TASKS for key in kinds.find(name).uses}
        for key, users in kinds.users().items():
            if self._given(key) and key not in used:
                lines.append(f"{key} has no effect without {' or '.join(users)} among tasks")
        return lines

    def _given(self, *keys: str) -> list[str]:
        return [key for key in keys if key in self.model_fields_set]


class CompareConfig(Config):
    """Keys of `jobs/compare.py`."""

    reports: tuple[str, ...] = Field(
        min_length=2, description="outputs of jobs/evaluate.py, [URI,URI,…]; the others are compared with the first"
    )
    output: str = Field(description="URI of the folder for comparison.json and comparison.html")
    names: tuple[str, ...] = Field((), description="what to call each of them; empty: by model and folder")
    bootstrap: int = Field(1000, ge=0, description="resamples, the same for all; 0: no intervals, no p-values")
    seed: int = Field(0, ge=0, description="of the bootstrap")
    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where MLflow keeps the run")

    @field_validator("reports")
    @classmethod
    def _differ(cls, reports: tuple[str, ...]) -> tuple[str, ...]:
        addresses = [storage.normalise(uri) for uri in reports]
        repeated = next((uri for uri in addresses if addresses.count(uri) > 1), None)
        if repeated is not None:
            raise ValueError(f"{repeated} is given more than once")
        return tuple(addresses)
