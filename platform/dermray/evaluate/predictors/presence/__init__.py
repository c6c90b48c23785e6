"""Presence of concepts: whether the image lies nearer to a sentence with the concept than to the one without it."""

from dermray.evaluate.predictors.kinds import CONCEPTS, PredictorKind

KIND = PredictorKind(f"{__name__}.module", CONCEPTS)
