"""Keys of a sweep: which recipe, what varies, how many trials, and when a trial is given up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dermray.config import ClusterConfig, Config, TrackingConfig, Uri
from dermray.corpus.shares import LocatedCorpora, uris_of
from dermray.documents import Scalar
from dermray.evaluate.settings import EvaluateConfig
from dermray.keys import Argument, Reader, annotation_of, merged
from dermray.ledger import WaitForOutput
from dermray.train.settings import PretrainConfig
from dermray.tuning import space as spaces
from dermray.tuning.space import Parameter

# Set by the sweep itself, trial by trial.
OWN_KEYS = ("corpus", "output", "run_name", "cluster", "tracking", "validation.every_steps")
# More than any sweep has that comes to its end: each trial is planned before the first one starts.
MAX_TRIALS, MAX_VALIDATIONS = 10_000, 10_000
# Of evaluations; benchmarks bring their test splits, by which nothing must be chosen.
OWN_KEYS_OF_EVALUATIONS = ("corpus", "output", "run_name", "cluster", "tracking", "benchmark", "data")


# What population-based training may change between two steps of a training: it changes neither which samples come in
# which order, nor the shape of anything in a checkpoint, nor the number of steps.
CHANGEABLE_KEYS = (
    *("optim.lr", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps", "train.grad_clip_norm"),
    *("data.captions", "data.crop_scale", "data.horizontal_flip", "data.color_jitter", "data.color_jitter_prob"),
    *("data.grayscale_prob", "loss.mask_duplicates"),
)


class SchedulerConfig(Config):
    """What is done with trials at their validations: asynchronous successive halving (Li et al., MLSys 2020) or
    population-based training (Jaderberg et al., 2017).
    """

    kind: Literal["asha", "pbt", "none"] = Field(
        "asha",
        description="asha: poor trials are stopped; pbt: they go on from a better one's checkpoint; none: neither",
    )
    grace_period: int = Field(1, ge=1, description="asha: no trial is stopped before so many validations")
    reduction_factor: float = Field(3, gt=1, description="asha: at each rung one in so many trials goes on")
    perturbation_interval: int = Field(1, ge=1, description="pbt: validations from one exploit to the next")
    quantile_fraction: float = Field(
        0.25, gt=0, le=0.5, description="pbt: this share of the trials, the worst, goes on from as many of the best"
    )
    resample_probability: float = Field(
        0.25, ge=0, le=1, description="pbt: a key of a trial that does is drawn anew instead of moved by a fifth"
    )


class SweepConfig(Config):
    """Everything `tune/sweep.py` can be told."""

    job: Literal["pretrain", "evaluate"] = Field(
        "pretrain", description="what a trial is: a pretraining, or an evaluation of one model on a validation split"
    )
    recipe: str | None = Field(
        None, description="YAML file that the trials vary; pretrain needs one, evaluate can do with overrides"
    )
    corpus: LocatedCorpora = Field(
        description="URI of a prepared corpus; pretrain takes several with their shares: [{uri: URI, weight: 2}, …]"
    )
    output: Uri = Field(description="URI for the trials and the best recipe; the same URI again resumes")
    space: dict[str, Parameter] = Field(
        min_length=1,
        description="pretrain key: {kind: loguniform|uniform|int, low: .., high: ..} or {kind: choice, values: [..]}",
    )
    overrides: dict[str, Any] = Field({}, description="pretrain keys that all trials share, over the recipe's")
    search: Literal["random", "grid", "tpe"] = Field(
        "random", description="random; grid: every point, ranges need steps; tpe: Optuna's, which learns from trials"
    )
    num_trials: int = Field(
        8, ge=1, le=MAX_TRIALS, description="trials to draw from the space; a grid has as many as it has points"
    )
    max_samples: int | None = Field(
        None, ge=1, description="no further trial starts once all together have seen so many training samples"
    )
    max_hours: float | None = Field(None, gt=0, description="no further trial starts so long after the command began")
    max_trial_failures: int = Field(
        1, ge=0, description="times a trial that fails is begun again before it is given up"
    )
    num_validations: int = Field(
        8,
        ge=1,
        le=MAX_VALIDATIONS,
        description="validations of a trial that runs to its end, at equal shares of its training",
    )
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="trials at the same time; empty: 1 on CPUs, as many as there are cards on GPUs"
    )
    objective: str = Field("validation_zero_shot_accuracy", description="validation metric that decides")
    mode: Literal["max", "min"] = Field("max", description="whether more or less of the objective is better")
    scheduler: SchedulerConfig = SchedulerConfig()
    seed: int = Field(0, ge=0, description="of the draw of trials; their training has the recipe's own seed")
    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the parent run in MLflow; empty: from recipe and output")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @classmethod
    def prepared(cls, tree: Mapping[str, Any], reader: Reader) -> Mapping[str, Any]:
        """Values that trials shall have are read by the types of the trials' own keys: `0042` may be a name."""
        evaluates = _text_of(tree.get("job")) == "evaluate"
        target: type[Config] = EvaluateConfig if evaluates else PretrainConfig
        found = dict(tree)
        if isinstance(tree.get("overrides"), Mapping):
            found["overrides"] = reader.section(target, _nested(tree["overrides"]), "overrides.")
        if isinstance(tree.get("space"), Mapping):
            flat = spaces.dotted(tree["space"])
            found["space"] = {key: _varied(target, reader, key, value) for key, value in flat.items()}
        return found

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, tree: Any) -> Any:
        return spaces.dotted(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        own = OWN_KEYS if self.job == "pretrain" else OWN_KEYS_OF_EVALUATIONS
        taken = [key for key in own if key in self.space or _holds(self.overrides, key)]
        if taken:
            raise ValueError(f"{', '.join(taken)}: the sweep sets this itself; take it out of space and overrides")
        self._check_space()
        if self.job == "evaluate":
            self._check_evaluations()
        elif self.recipe is None:
            raise ValueError("recipe: a sweep of pretrainings needs one, such as jobs/configs/demo.yaml")
        if self.scheduler.kind == "pbt":
            self._check_population()
        return self

    def without_effect(self) -> list[str]:
        """A line for each key that cannot do what it says."""
        found = []
        scheduler = self.scheduler
        if self.job == "pretrain" and scheduler.kind == "asha" and scheduler.grace_period > self.num_validations - 1:
            found.append(
                f"scheduler.grace_period={scheduler.grace_period} reaches the last of num_validations="
                f"{self.num_validations}: no trial is stopped early"
            )
        if self.search == "grid" and "num_trials" in self.model_fields_set:
            found.append("num_trials has no effect with search=grid, which has as many trials as points")
        if self.job == "evaluate":
            keys = {"num_validations", "max_concurrent_trials", "max_trial_failures"} & self.model_fields_set
            found += [f"{key} has no effect with job=evaluate" for key in sorted(keys)]
        return found

    @property
    def corpus_uris(self) -> tuple[str, ...]:
        """Where the corpora are."""
        return uris_of(self.corpus)

    def _check_evaluations(self) -> None:
        if len(self.corpus_uris) > 1:
            raise ValueError("corpus: an evaluation scores the samples of one corpus; give job=evaluate one URI")
        if "/" not in self.objective:
            raise ValueError(
                f"objective: {self.objective} is no score of an evaluation; give TASK/SCORE as its report has it, such "
                "as linear_probe/100pct_balanced_accuracy"
            )
        if self.scheduler.kind == "pbt" or self.max_samples is not None:
            raise ValueError("scheduler.kind, max_samples: evaluations train nothing")

    def _check_population(self) -> None:
        for key in self.space:
            if not any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS):
                raise ValueError(
                    f"space.{key}: population-based training cannot change it while a trial trains; it can change "
                    f"{', '.join(CHANGEABLE_KEYS)}"
                )
        if self.search == "tpe":
            raise ValueError("search: population-based training begins with random or grid trials, not with tpe")
        if self.max_samples is not None or self.max_hours is not None:
            raise ValueError(
                "max_samples, max_hours: population-based training runs all its trials to their end; lower num_trials "
                "or train less"
            )
        if (len(spaces.grid(self.ordered_space)) if self.search == "grid" else self.num_trials) < 2:
            raise ValueError("num_trials: population-based training needs at least 2")
        if self.scheduler.perturbation_interval >= self.num_validations:
            raise ValueError(
                f"scheduler.perturbation_interval: nothing is left to train after {self.num_validations} validations "
                "(num_validations)"
            )

    def _check_space(self) -> None:
        space = self.ordered_space
        if self.search == "grid":
            spaces.grid(space)
            return
        if self.search == "tpe" and "num_workers" in space:
            raise ValueError("space.num_workers: tpe proposes trials one by one, but the cluster is shared out before")
        available = spaces.num_points(self.space)
        if self.num_trials > available:
            raise ValueError(f"num_trials: the space holds {available:g} different trials, not {self.num_trials}")

    @property
    def ordered_space(self) -> dict[str, Parameter]:
        """The space with each parameter behind those that its conditions name."""
        return spaces.ordered(self.space)

    @property
    def proposed_from(self) -> dict[str, Any] | None:
        """The space by `space.KEY`, as JSON has it, where trials are proposed from it; None: they are drawn beforehand.

        Drawn values tell another space by themselves; a proposed trial keeps its point whatever the space is.
        """
        if self.search != "tpe":
            return None
        return {
            f"space.{key}": parameter.model_dump(mode="json", exclude_defaults=True)
            for key, parameter in self.space.items()
        }


def _varied(target: type[Config], reader: Reader, key: str, parameter: Any) -> Any:
    """A parameter of the space with its values, and those of its conditions, as their keys take them."""
    if not isinstance(parameter, Mapping):
        return parameter
    found = dict(parameter)
    if isinstance(found.get("values"), list | Argument):
        found["values"] = reader.read(list[annotation_of(target, key)], found["values"], f"space.{key}.values")  # type: ignore[misc]
    if isinstance(found.get("when"), Mapping):
        found["when"] = {
            other: reader.read(list[annotation_of(target, other)], values, f"space.{key}.when.{other}")  # type: ignore[misc]
            for other, values in found["when"].items()
        }
    return found


def _nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides section by section, whether they were written dotted or nested."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _nested(value) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        found = merged(found, inner)
    return found


def _text_of(value: Any) -> str | None:
    return value.text if isinstance(value, Scalar | Argument) else value


def _holds(tree: dict[str, Any], key: str) -> bool:
    """True if a nested or dotted mapping sets `key`."""
    if key in tree:
        return True
    section, _, rest = key.partition(".")
    below = tree.get(section)
    return bool(rest) and isinstance(below, dict) and _holds(below, rest)
