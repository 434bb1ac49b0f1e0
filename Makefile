# The chores of the repository. `make help` lists them; CONTRIBUTING.md says when to use which.
#
# PYTHON=...       the interpreter that makes the virtual environment (3.11 or newer)
# TORCH_INDEX=URL  a further package index for torch, say one with CPU-only wheels; read when the environment is made
# ARGS=...         passed on to the demo or to pytest:  make demo ARGS="--steps 40"   make test ARGS="-k launch"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The stamp carries a hash of what it depends on, not a time: a fresh clone or a change of branch gives files new times,
# and the second run must need no network.
PINNED := setup.py pyproject.toml constraints.txt
STAMP := $(VENV)/installed-$(shell cat $(PINNED) | sha256sum | cut -c1-16)

.PHONY: help install demo test test-all check test-gpu soak clean

help: ## list the chores
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv and install the pinned set

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) lacks venv; install it (Debian, Ubuntu: apt-get install python3-venv) or name another: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: $(STAMP) ## fetch, build, train on 2 ranks, kill, resume, evaluate: runs/demo/report.html
	$(BIN)/triweave demo $(ARGS)

test: $(STAMP) ## the quick suite, at most 10 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow and not gpu and not soak" $(ARGS)

test-all: $(STAMP) ## everything a machine without a GPU can test, at most an hour
	$(BIN)/python -m pytest -m "not gpu and not soak" $(ARGS)

check: $(STAMP) ## lint, format, types, import arrows
	@mkdir -p .types && ln -sfn .. .types/triweave
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_import_budget.py

test-gpu: ## on a machine with a CUDA device, torch and triton: checks and benchmark into kernels/results, 10 minutes
	@mkdir -p .types && ln -sfn .. .types/triweave
	PYTHONPATH=.types $(GPU_PYTHON) -m triweave.kernels.device.device_suite $(ARGS)
	@if $(GPU_PYTHON) -c 'import pytest, pytest_timeout, deepspeed' 2>/dev/null; \
	then $(GPU_PYTHON) -m pytest -m "gpu and not slow"; \
	else echo "make test-gpu: the tests marked gpu are left out, $(GPU_PYTHON) lacks pytest or deepspeed (make install)"; fi

soak: $(STAMP) ## hundreds of kills and long fuzzing, by hand
	$(BIN)/python -m pytest -m soak $(ARGS)

clean: ## remove .venv, build outputs and caches; runs/ and corpora/ stay
	rm -rf $(VENV) .types build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
