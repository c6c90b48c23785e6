"""Few-shot: the linear probe on a few training images a class."""

from dermray.evaluate.predictors.kinds import CLASSES
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind(
    "Few-shot",
    f"{__name__}.module",
    uses=("shots", "num_draws", "train_split"),
    learns=True,
    takes=CLASSES,
    predictor="linear_probe",
    vectors=False,
    fixes=("probe_cost",),
)
