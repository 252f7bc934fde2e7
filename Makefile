# RenalQ. `make` alone lists what there is; every target sets up what it needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.set-up
EXTRAS := api,worker,monitor,cli,local,dvc,dev
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# What pip or a user has put into these would reach into the virtual environment.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup demo test test-all faults long picture storm up lint doctor clean

help: ## List the targets.
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make the virtual environment .venv with everything in it (once).

# The stamp is newer than both files when the environment holds what they ask for: later calls cost nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "RenalQ needs Python 3.11 or later, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (the first time this takes some minutes) …"
	@python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup ## Train on synthetic CT and predict ten new scans, from nothing, in under five minutes.
	@renalq demo

up: setup ## Start the whole stack on this machine; Ctrl-C stops it.
	@renalq up

doctor: setup ## Say what is here, and what to do about what is not.
	@renalq doctor

lint: setup ## Style, types, and the arrows between packages.
	ruff check .
	ruff format --check .
	mypy
	lint-imports

TESTS := "not (faults or full or long)" "faults and not full"

test: setup ## Lint, and the tests for each change: at most twelve minutes on two cores.
	@.ci/check $(TESTS)

test-all: setup ## What CI runs: `make test`, then all networks, real scans, long trainings and many examples.
	@.ci/check $(TESTS) "all:full or long or scaled or hypothesis"

faults: setup ## Every case of the fault list: real processes, killed in every way.
	@pytest -m faults

long: setup ## Tests that train for minutes: does Grad-CAM find the tumours?
	@pytest -m long -s

picture: setup ## Draw docs/architecture.svg and list the rooms, from the import graph.
	@python -m tests.docs.picture

storm: setup ## Kill everything for a while, then count: make storm SEED=1 MINUTES=10.
	@python -m tests.faults.storm --seed $(or $(SEED),1) --minutes $(or $(MINUTES),10)

bench-%: setup ## Run one benchmark, such as bench-train ARGS="--quick": a table, and bench/out/NAME.json.
	@python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$(EXTRAS),bench]'
	@python -m bench.$(subst -,_,$*) $(ARGS)

clean: ## Remove what tools have left; .venv and the state in .renalq stay.
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis bench/out build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
