"""Retrieval: an image's raw caption among all, and a caption's image among all."""

from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind("Retrieval", f"{__name__}.module")
