# Everything a person types. `make help` lists it.

PYTHON ?= python3
# Index of PyTorch's CPU builds, for people whose pip would otherwise find a CUDA build. Empty: pip's own.
TORCH_INDEX ?=
# Processes that run tests side by side.
TEST_JOBS ?= 2
# Flags for the server, as in: make serve ARGS="--port 8000"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint configs/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SERVE_STAMP := $(VENV)/.installed-serve
DEV_STAMP := $(VENV)/.installed-dev
INSTALL_INPUTS := pyproject.toml configs/constraints.txt $(wildcard mixtral_serve/kernels/csrc/*)

# As the server sets it for its engine: threads of PyTorch that wait do not spin.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help serve install test check lint mutants mutation demo-model clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  Variables: PYTHON (the interpreter), TORCH_INDEX (an index with CPU builds of PyTorch), ARGS (server flags), TEST_JOBS'

serve: $(SERVE_STAMP) ## install what is needed and serve the demo model on 127.0.0.1:11400
	@$(BIN)/mixtral-serve serve --config configs/demo.toml $(ARGS)

install: $(DEV_STAMP) ## install into .venv, with everything for development

test: $(DEV_STAMP) lint ## linters, types, floors and all tests with coverage (under 20 minutes)
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n $(TEST_JOBS) --cov --cov-report=
	@$(BIN)/python -m coverage report --skip-covered --skip-empty
	@$(BIN)/python -m coverage report --include='scheduler/*' --fail-under=100 --format=total > /dev/null \
		|| { echo 'scheduler/ must be covered completely:'; \
		     $(BIN)/python -m coverage report --include='scheduler/*' --show-missing --skip-covered; exit 1; }

check: $(DEV_STAMP) lint ## the quick cut: everything but the slow tests (under 3 minutes)
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m 'not slow'

lint: $(DEV_STAMP) ## ruff, mypy --strict and the floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: $(DEV_STAMP) ## break the scheduler on purpose, in named ways: the tests must notice each
	$(BIN)/python tests/mutation/run.py

mutation: $(DEV_STAMP) ## break the scheduler in general ways and print how many breaks the tests notice
	$(BIN)/python tests/mutation/general.py

demo-model: $(DEV_STAMP) ## train the bundled demo model again (about an hour on two cores)
	$(BIN)/python -m mixtral_serve.demo.train --out build/demo-model

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or later is needed; name one with PYTHON=...'; exit 1; }
	@echo 'Creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)

$(SERVE_STAMP): $(VENV)/bin/python $(INSTALL_INPUTS)
	@echo 'Installing (a few minutes the first time)'
	@$(PIP_INSTALL) --editable .
	@touch $@

$(DEV_STAMP): $(VENV)/bin/python $(INSTALL_INPUTS)
	@echo 'Installing with the development extras (a few minutes the first time)'
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(SERVE_STAMP)
