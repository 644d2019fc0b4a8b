# `make demo` and `make test` need nothing but Python >= 3.11: each creates .venv if it is absent,
# installs the versions pinned in constraints.txt, and does its job. `make test-r` needs Debian or Ubuntu, too.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

DEMO_ARGS   ?= --out demo-results
PYTEST_ARGS ?= -n 2 --dist loadfile
# Two test workers with one thread each: more would only get in each other's way.
TEST_ENV    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=Agg

# Debian's names; the docs name the versions.
R_PACKAGES := r-base-core r-cran-reticulate r-bioc-singlecellexperiment r-cran-seurat libpython3-dev
SUDO       := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-r lint format docs bench-import clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-run  ## Train scVI on real PBMC counts and write results and pictures to demo-results/
	$(BIN)/python -m pyrosc demo $(DEMO_ARGS)

test: lint  ## Lint, format, types, tests, doctests, executed tutorials
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-r: $(VENV)/.stamp-run  ## The code of docs/user_guide/from_r.md in R (apt-get installs what is missing)
	@missing=$$(for p in $(R_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "Installing" $$missing; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends $$missing; \
	fi
	RETICULATE_PYTHON=$(abspath $(BIN)/python) $(TEST_ENV) Rscript tests/r/from_r.R docs/user_guide/from_r.md

lint: $(VENV)/.stamp-test  ## Lint, format check and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyrosc

format: $(VENV)/.stamp-test  ## Let ruff format the code and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs  ## Build the documentation into docs/_build (warnings are errors)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

bench-import: $(VENV)/.stamp-run  ## Time `import pyrosc` against the libraries it stands on
	$(BIN)/python benchmarks/import_time.py

clean:  ## Remove the environment, caches and results
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis docs/_build demo-results

# The environment, in steps; a stamp is older than pyproject.toml or constraints.txt when it must be redone.

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 was not found; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"pyrosc needs Python >= 3.11, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=/path/to/python3.11")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Torch goes first, at its pinned version: asked for through another package it could come as its largest build.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	@echo "Installing torch (a few minutes the first time)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing pyrosc and what it needs (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing pyrosc and the tools for its tests (a few minutes the first time)"
	@$(PIP) -e ".[dev,datasets,multi]"
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-docs: $(VENV)/.stamp-torch pyproject.toml
	@echo "Installing pyrosc and the tools for its documentation (a few minutes the first time)"
	@$(PIP) -e ".[docs,datasets,multi]"
	@touch $@ $(VENV)/.stamp-run
