"""Zero-shot classifier: the class whose texts lie nearest to the image."""

from dermray.evaluate.predictors.kinds import CLASSES, PredictorKind

KIND = PredictorKind(f"{__name__}.module", CLASSES)
