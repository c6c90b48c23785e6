"""Nearest neighbours: the training images nearest to an image vote."""

from dermray.evaluate.predictors.kinds import CLASSES
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind(
    "Nearest neighbours",
    f"{__name__}.module",
    uses=("neighbours", "train_split"),
    learns=True,
    calibrated=True,
    takes=CLASSES,
    predictor="knn",
    vectors=False,
)
