# make train, make test: nothing else is needed on a machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Tests wait as often as they compute: for processes, files and signals.
JOBS ?= $(shell expr `nproc` \* 2)
# Images for GPUs lag behind; Triton 3.6, which this torch needs, cannot interpret with NumPy 2.4.
OLDEST ?= 'torch==2.11.*' 'numpy<2.4'

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# DeepSpeed compiles its CPU optimizer with the ninja that is installed beside it.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup train test test-full test-oldest test-exhaustive gpu paper check format clean

help:  ## Show this page
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(INSTALLED)  ## Make the virtual environment in .venv

train: $(INSTALLED)  ## Train the tiny model (ARGS="key=value ..." changes settings)
	$(BIN)/python -m mst_train $(ARGS)

test: $(INSTALLED)  ## Run the tests, side by side on all cores (JOBS=0: one after the other)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-full: $(INSTALLED)  ## Run the slow ones too, which CI does
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not exhaustive" $(ARGS)

test-oldest:  ## Run the core of the tests on the oldest torch, in an environment of its own
	$(PYTHON) -m venv $(VENV)-oldest
	grep -vE '^(torch|triton|numpy)==' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
	  --editable '.[dev]' $(OLDEST)
	$(VENV)-oldest/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS) \
	  $(addprefix tests/,attention kernels memory model mst optim plan run)

test-exhaustive: $(INSTALLED)  ## Run what test-full leaves out: more of the same
	$(BIN)/python -m pytest -m exhaustive $(ARGS)

gpu:  ## Test and measure on one GPU, in some minutes, into runs/gpu (ARGS="--small" to try it here)
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

paper: $(INSTALLED)  ## Predict and measure what the paper reports, into docs/paper (ARGS="--only PIECE")
	@$(BIN)/python -c 'import transformers' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[paper]'
	$(BIN)/python -m mst_train.paper $(ARGS)

check: $(INSTALLED)  ## Lint, check the format and the types
	$(BIN)/hadolint Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and what the tools left (runs/ stays)
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mst_train needs Python 3.11 or later, and $(PYTHON) is `$(PYTHON) --version 2>&1`: name another with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
