# `make help` lists the targets. On a machine without a GPU, PIP_ARGS can name an index of CPU-only builds of torch.
# TORCH=2.11.0 makes any of them use that torch, in a separate environment.
SHELL := /bin/bash
PYTHON ?= python3
NPROC ?= 4
WORKERS ?= 2
TORCH ?=
VENV := .venv$(TORCH:%=-torch-%)
BIN := $(VENV)/bin
PIP_ARGS ?=
# Filters pip's output: large downloads, progress, and the installation.
PROGRESS = function say(what) {print "  " what; fflush()} \
	/^Collecting/ && !(++packages % 20) {say(packages " packages found")} \
	/(Downloading|Using cached) .*\([0-9][0-9.]* (MB|GB)\)/ && !/ \([0-9]?[0-9]\.[0-9] MB\)/ \
		{name = $$(NF - 2); sub(".*/", "", name); sub("-cp.*|-py.*", "", name); say(name " " $$(NF - 1) " " $$NF)} \
	/^Installing collected/ {say("installing " (split($$0, words) - 3) " packages")}
TYPES := $(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_ARGS)

.PHONY: help train test test-all setup lint types clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+[a-z -]*:.*## / {printf "make %-28s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: setup ## set up, then train the default 2D job on NPROC=4 local ranks; ARGS="key=value ..." for another
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) train.py $(ARGS)

# Most tests keep one core busy, and none depends on the clock: WORKERS of them run in parallel.
test: CASES := -m "not exhaustive"
test test-all: setup ## set up, then lint, types and tests; test-all adds the exhaustive ones; TORCH=2.11.0 uses that torch
ifeq ($(TORCH),) # other versions have other types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(TYPES)
endif
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(CASES)

setup: $(VENV)/.ready ## create .venv with the versions of constraints.txt

# torch comes first and by itself, so that nothing else chooses its build. Bytecode is made afterwards, on all cores
# and without the libraries' own tests and models, some of which are not valid in this Python version.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; mine = sys.version_info[:2]; sys.exit(not (3, 11) <= mine <= (3, 14) and \
		"$(PYTHON) is Python %d.%d, and torch needs 3.11 to 3.14; try: make PYTHON=python3.13" % mine)'
	@echo "setting up $(VENV), 1 of 3: the environment"
	@$(PYTHON) -m venv $(VENV)
	@sed '$(TORCH:%=s/^torch==.*/torch==%/)' constraints.txt > $(VENV)/constraints.txt
	@echo "setting up $(VENV), 2 of 3: torch, 200 MB for CPUs and gigabytes with CUDA"
	@set -o pipefail; $(PIP) "$$(grep '^torch==' $(VENV)/constraints.txt)" | awk '$(PROGRESS)'
	@echo "setting up $(VENV), 3 of 3: the other dependencies in pyproject.toml"
	@set -o pipefail; $(PIP) -c $(VENV)/constraints.txt -e '.[dev]' | awk '$(PROGRESS)'
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/(tests|models)/' $(VENV)/lib || true
	@touch $@

lint: setup ## ruff, with automatic fixes
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup ## pyrefly
	@$(TYPES)

clean: ## remove .venv, its variants for other torch versions, and builds
	rm -rf .venv .venv-torch-* build dist *.egg-info
