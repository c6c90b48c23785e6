"""Scores of a model: a folder for each task and predictor, the suite that runs them, and their report."""
