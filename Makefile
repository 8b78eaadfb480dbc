# Every target that needs the environment builds it first; nothing else has to be installed but Python and pip.
PYTHON ?= python3
TORCH_VERSION := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format mutations bench figures build clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Build .venv with torch, the project and its tools (nothing to do when nothing changed)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -qq "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	@touch $@

demo: install ## Compare four methods on real images; writes runs/demo/report.html
	$(BIN)/fedraclora compare experiment=demo out=$(DEMO) resume=true
	@echo "Report: $(DEMO)/report.html"

test: install ## Run the default test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: install ## Run the slow tests
	$(BIN)/python -m pytest -m slow

check: install ## Run the static checks, then the default test suite
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: install ## Format the code and repair what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

mutations: install ## Break the code in known ways; each must make a test fail
	$(BIN)/python tests/mutate.py

bench: install ## Measure the time of one round
	$(BIN)/python -m experiments.benchmarks.round_time

figures: install ## Draw the figures of the README and docs again, from the data in experiments/results
	$(BIN)/python -m experiments.figures

build: install ## Build the wheel into dist
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Remove the environment, caches and built files; results in runs stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
