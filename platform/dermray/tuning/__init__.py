"""Sweeps: which trials to run, the trial that is a whole pretraining, and what the trials together say."""
