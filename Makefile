# make demo and make test need nothing but Python >= 3.11 and pip; they do everything else themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint fast docs clean

help:  ## Say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

demo: $(VENV)/.run  ## Find a real model's task vectors; writes tvlens-demo/report.html
	$(BIN)/tvlens demo

test: lint  ## Lint, type check, all tests, coverage
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --durations=10

fast: lint  ## Lint, type check, tests without real models
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev  ## Build the documents, warnings as errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# One stamp file a kind of environment: a second run installs nothing and needs no network.
$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvlens needs Python >= 3.11: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing tvlens into $(VENV); the first time takes two or three minutes ..."
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

# pip before 25.1 knows no dependency groups, and a fresh environment may hold such a pip.
GROUPS_OF = import tomllib; \
  groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
  print(*map(repr, groups["lint"] + groups["test"]))

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing what the tests need ..."
	@$(PIP) install --constraint constraints.txt --editable '.[docs]' $(shell $(PYTHON) -c '$(GROUPS_OF)')
	@touch $@

clean:  ## Remove the environment and what the commands wrote
	rm -rf $(VENV) tvlens-demo docs/_build
