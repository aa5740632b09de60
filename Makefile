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
	$(BIN)/tvlens models > /dev/null
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
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvlens needs Python >= 3.11; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install --constraint constraints.txt --editable '.[docs]' $(shell $(PYTHON) -c \
	  'import tomllib; g = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; print(*(repr(r) for r in g["lint"] + g["test"]))')
	touch $@

clean:  ## Remove the environment and what the commands wrote
	rm -rf $(VENV) tvlens-demo docs/_build
