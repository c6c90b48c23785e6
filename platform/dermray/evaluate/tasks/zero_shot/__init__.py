"""Zero-shot classification: the condition of an image by the texts that name each."""

from dermray.evaluate.predictors.kinds import CLASSES
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind(
    "Zero-shot",
    f"{__name__}.module",
    uses=("templates",),
    calibrated=True,
    takes=CLASSES,
    predictor="zero_shot",
    vectors=False,
)
