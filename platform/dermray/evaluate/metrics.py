"""`dermray.evaluate.metrics.classification`, a public name; it is computed in `dermray.evaluate.statistics.metrics`."""

from dermray.evaluate.statistics.metrics import classification

__all__ = ["classification"]
