"""What a user starts: a module each, whose `main` reads keys, does the work under an MLflow run and says how it went.

`dermray NAME` finds one by its module's name, and `jobs/NAME.py` and `tune/sweep.py` are the same. They import what
takes seconds only after the keys are known to be right.
"""
