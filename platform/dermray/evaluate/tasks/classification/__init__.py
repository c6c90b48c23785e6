"""Classification: whoever gives probabilities of the classes is scored, a fine-tuned network for instance."""

from dermray.evaluate.predictors.kinds import CLASSES
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind(
    "Classification",
    f"{__name__}.module",
    uses=("templates",),
    calibrated=True,
    takes=CLASSES,
    predictor="zero_shot",
    vectors=False,
)
