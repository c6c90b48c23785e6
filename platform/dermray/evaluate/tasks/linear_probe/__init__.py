"""Linear probe: the published logistic regression on frozen image vectors."""

from dermray.evaluate.predictors.kinds import CLASSES
from dermray.evaluate.tasks.kinds import TaskKind

TASK = TaskKind(
    "Linear probe",
    f"{__name__}.module",
    uses=("label_fractions", "probe_cost", "num_draws", "train_split"),
    learns=True,
    calibrated=True,
    takes=CLASSES,
    predictor="linear_probe",
    vectors=False,
)
