"""Scores of masks, public names; they are computed in `dermray.evaluate.statistics.masks`."""

from dermray.evaluate.statistics.masks import dice, hausdorff_95, jaccard, largest_spot, published

__all__ = ["dice", "hausdorff_95", "jaccard", "largest_spot", "published"]
