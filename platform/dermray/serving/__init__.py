"""What serving needs besides HTTP: which model is served, and text classifiers that are built once."""

from dermray.serving.classifier import ClassifierCache, RankedClass, rank
from dermray.serving.model import ModelSource, ServedModel, locate, served_model

__all__ = [
    "ClassifierCache",
    "ModelSource",
    "RankedClass",
    "ServedModel",
    "locate",
    "rank",
    "served_model",
]
