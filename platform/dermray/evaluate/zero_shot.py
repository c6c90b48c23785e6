"""Zero-shot classification under the names that others import; it lives in `dermray.predict.zero_shot`."""

from dermray.predict.zero_shot import TEMPLATES, build_classifier, classifier_weights, fill, probabilities

__all__ = ["TEMPLATES", "build_classifier", "classifier_weights", "fill", "probabilities"]
