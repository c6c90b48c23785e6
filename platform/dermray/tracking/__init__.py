"""The one place that talks to MLflow. Only drivers call it; everything else hands them figures and URIs.

SQLite and a local artifact folder by default (where `mlflow ui` looks too), any tracking URI otherwise.
"""

from dermray.tracking.delivery import Delivered, deliver_left_over
from dermray.tracking.deployments import record_deployment, served_tags, version_served_before
from dermray.tracking.evaluations import log_evaluation
from dermray.tracking.registry import (
    CHAMPION,
    MODELS_PREFIX,
    Registration,
    ResolvedModel,
    model_facts,
    move_alias,
    register,
    resolve_model,
    version_at,
)
from dermray.tracking.runs import Run, flatten, provenance, run
from dermray.tracking.store import client, tracking_uri

__all__ = [
    "CHAMPION",
    "MODELS_PREFIX",
    "Delivered",
    "Registration",
    "ResolvedModel",
    "Run",
    "client",
    "deliver_left_over",
    "flatten",
    "log_evaluation",
    "model_facts",
    "move_alias",
    "provenance",
    "record_deployment",
    "register",
    "resolve_model",
    "run",
    "served_tags",
    "tracking_uri",
    "version_at",
    "version_served_before",
]
