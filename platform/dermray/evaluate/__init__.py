"""Scores of a model: one file per task, metrics with intervals, the suite that runs them, and their report."""
