"""MAKE's losses: an image against several texts of its own, whole and by its patches (arXiv 2505.09372), and O-MAKE's.

O-MAKE (arXiv 2512.03445) grades the targets by how near two diagnoses stand in the disease tree. What is computed here
is what the papers mean; the released code mixes two orders of its texts up, and `mode="released"` does as it does, for
comparison.
"""

from dermray.losses.make.loss import MakeLoss, Terms, objective
from dermray.losses.make.patches import local_vectors
from dermray.losses.make.settings import MakeSettings

__all__ = ["MakeLoss", "MakeSettings", "Terms", "local_vectors", "objective"]
