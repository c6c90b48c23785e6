"""Concept annotation: which of the published concepts are in an image."""

from dermray.evaluate.predictors.kinds import CONCEPTS
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind("Concepts", f"{__name__}.module", takes=CONCEPTS, predictor="presence", vectors=False)
