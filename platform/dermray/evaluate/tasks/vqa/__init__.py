"""Questions and answers: closed questions on each image, answered by the text that is nearest to it."""

from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind("Questions and answers", f"{__name__}.module")
