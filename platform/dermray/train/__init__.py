"""Pretraining: the loop, its optimiser and schedule, checkpoints, and the Ray Train glue."""
