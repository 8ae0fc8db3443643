# `make help` lists the targets. On a machine without a GPU, PIP_ARGS can name an index of CPU-only builds of torch.
SHELL := /bin/bash
PYTHON ?= python3
NPROC ?= 4
BIN := .venv/bin
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_ARGS)

.PHONY: help train test test-all setup lint types clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+[a-z -]*:.*## / {printf "make %-28s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: setup ## set up, then train the default 2D job on NPROC=4 local ranks; ARGS="key=value ..." for another
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py $(ARGS)

test: CASES := -m "not exhaustive"
test test-all: setup ## set up, then lint, types and tests; test-all has the exhaustive ones too
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(CASES)

setup: .venv/.ready ## make .venv with the versions of constraints.txt

# torch comes first and by itself, so that nothing else chooses its build. Bytecode is made afterwards, on all cores
# and without the libraries' own tests and models, some files of which are no Python of this version.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tpresearch needs Python 3.11 or newer")'
	@echo "setting up .venv, 1 of 3: the environment"
	@$(PYTHON) -m venv .venv
	@echo "setting up .venv, 2 of 3: torch, 200 MB for CPUs and gigabytes with CUDA"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "setting up .venv, 3 of 3: what else there is in pyproject.toml"
	@set -o pipefail; $(PIP) -c constraints.txt -e '.[dev]' \
		| awk '/^Collecting/ {print "  " $$2; fflush()} /^Installing collected/ {print "  installing"; fflush()}'
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests|models)/' .venv/lib || true
	@touch $@

lint: setup ## ruff, mending what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup ## mypy
	@$(BIN)/mypy

clean: ## remove .venv and what was built
	rm -rf .venv build dist *.egg-info
