# The two commands a newcomer needs: make demo, make test. Both make their environment first when it is missing.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo environment test test-long unit lint format bench clean help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@echo "== environment: $(VENV) (installs about 6.6 GB, some 4 minutes the first time; reused afterwards)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

environment: $(STAMP)  ## the Python environment alone, which every other target makes when it is missing

demo: $(STAMP)  ## synthesize, prepare, pretrain, evaluate, register and serve, on this machine (some 10 minutes)
	@$(BIN)/python jobs/demo.py

test: $(STAMP)  ## the tests, but for those from end to end and of minutes (some 15 minutes on 2 cores)
	@echo "== tests without Ray, two at a time"
	@$(BIN)/python -m pytest tests/unit tests/golden -m "not long" -n 2 --dist worksteal --durations=5
	@echo "== tests on a Ray cluster, with servers, a browser and killed processes; the slowest are printed at the end"
	@$(BIN)/python -m pytest --ignore=tests/unit --ignore=tests/golden -m "not long" --durations=8

test-long: $(STAMP)  ## the tests from end to end, and of minutes: sweeps, killed and two-node trainings (CI runs them too)
	@echo "== long tests without Ray, two at a time"
	@$(BIN)/python -m pytest tests/unit -m long -n 2 --dist worksteal --durations=8
	@echo "== long tests on Ray clusters, with servers and killed processes"
	@$(BIN)/python -m pytest --ignore=tests/unit --ignore=tests/golden -m long --durations=25

unit: $(STAMP)  ## the tests that need no Ray (some six minutes)
	@$(BIN)/python -m pytest tests/unit tests/golden -m "not long" -n 2 --dist worksteal

lint: $(STAMP)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy platform/dermray
	@$(BIN)/mypy jobs tune serve

format: $(STAMP)  ## let ruff format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## side-by-side measurements; figures are kept in benchmarks/README.md
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove what demo and tests leave (not the environment)
	rm -rf demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
