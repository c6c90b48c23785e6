"""Nearest neighbours: the images nearest to an image vote."""

from dermray.evaluate.predictors.kinds import CLASSES, PredictorKind

KIND = PredictorKind(f"{__name__}.module", CLASSES, uses=("neighbours",))
