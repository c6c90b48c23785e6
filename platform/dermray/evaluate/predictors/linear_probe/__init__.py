"""Linear probe: a logistic regression on frozen image vectors."""

from dermray.evaluate.predictors.kinds import CLASSES, PredictorKind

KIND = PredictorKind(f"{__name__}.module", CLASSES, uses=("probe_cost",))
