"""What was served when: the runs that a server leaves when a version goes up, and what they tell afterwards."""

from __future__ import annotations

from dermray.config import Config, TrackingConfig
from dermray.tracking import store
from dermray.tracking.registry import ResolvedModel, model_facts
from dermray.tracking.runs import run

# Tags of every run that says which version of a model answers from then on, whether at a start or at a change.
SERVED_NAME, SERVED_VERSION, SERVED_ALIAS = "model_name", "model_version", "model_alias"
# Of one alias; a version before is nearly always among the last few.
MAX_RECORDS = 1000


def served_tags(name: str, version: str | None, alias: str | None) -> dict[str, str]:
    """The tags of a run after which this version answers under this name and alias."""
    tags = {SERVED_NAME: name, SERVED_VERSION: version, SERVED_ALIAS: alias}
    return {key: value for key, value in tags.items() if value}


def record_deployment(config: TrackingConfig, settings: Config, model: ResolvedModel) -> str | None:
    """A run of kind `deploy` that says which model goes up with which settings; its id, or None.

    For the builder of a server, once it has found its model. A model that is no folder leaves no digest.
    """
    facts = {**model_facts(model.folder_uri), **model.tags}
    version = f" version {model.version}" if model.version else ""
    with run(config, kind="deploy", name=f"deploy {model.name}{version}", resolved=settings) as current:
        if "dermray.weights_sha256" in facts:
            current.log_artifact("input", "model", model.folder_uri, facts["dermray.weights_sha256"])
        current.set_tags(served_tags(model.name, model.version, model.alias))
    return current.id


def version_served_before(config: TrackingConfig, *, name: str, alias: str, version: str) -> str | None:
    """The version that answered last under this name and alias before `version` did; None where no run tells.

    Args:
        name: what the model is served as.
        version: the one that answers now.

    Raises:
        TrackingError: MLflow is out of reach.
    """
    with store.asked(config) as mlflow_client:
        experiment = mlflow_client.get_experiment_by_name(config.experiment)
        if experiment is None:
            return None
        records = mlflow_client.search_runs(
            [experiment.experiment_id],
            f"tags.{SERVED_ALIAS} = '{alias}'",
            order_by=["start_time DESC"],
            max_results=MAX_RECORDS,
        )
    served = [one.data.tags.get(SERVED_VERSION) for one in records if one.data.tags.get(SERVED_NAME) == name]
    return next((one for one in served if one not in (None, version)), None)
