# make train [ARGS="..."]   set up, then train the default 2D job on 4 local ranks
# make test                 set up, then lint, types and tests
# make test-all             the same with the exhaustive cases
#
# On a machine without a GPU, PIP_ARGS can name an index of CPU-only builds of torch.
SHELL := /bin/bash
PYTHON ?= python3
NPROC ?= 4
BIN := .venv/bin
PIP_ARGS ?=

.PHONY: train test test-all setup lint types clean

train: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py $(ARGS)

test: CASES := -m "not exhaustive"
test test-all: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(CASES)

setup: .venv/.ready

# torch comes first and by itself, so that nothing else chooses its build.
.venv/.ready: pyproject.toml constraints.txt
	@echo "setting up .venv (about a minute on a warm package cache)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tpresearch needs Python 3.11 or newer")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

lint: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup
	@$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
