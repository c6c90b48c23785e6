"""Predictors, a folder each: what turns samples into predictions, which tasks then score."""
