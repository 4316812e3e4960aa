# make quickstart · make test · make test-fast · make lint · make types · make aot-tpu · make aot-gpu
# make test-gpu-kernel · make clean
#
# Each target sets up what it needs: a virtual environment at $(VENV) with the exact versions of constraints.txt.
# Another interpreter: make PYTHON=python3.13 VENV=.venv-newer test-fast. More test processes: make WORKERS=8 test.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
WORKDIR ?= runs/quickstart

BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
INPUTS = pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-fast lint types aot-tpu aot-gpu test-gpu-kernel clean

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.base
	$(BIN)/python -m experiments.quickstart --workdir $(WORKDIR)

test: $(VENV)/.test $(VENV)/.libtpu
	$(PYTEST)

test-fast: $(VENV)/.test $(VENV)/.libtpu
	$(PYTEST) -m "not slow"

# What only a newer JAX can show of GPU kernels: all of their interpreter, alone and in a model, and their compilation
# for an H100, with that of a training step of experts.
test-gpu-kernel: $(VENV)/.test $(VENV)/.cuda
	$(PYTEST) -m slow tests/test_mosaic_gpu.py tests/test_contract_gpu.py tests/test_grouped_gpu.py tests/test_aot_experts.py

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .

types: $(VENV)/.test
	$(BIN)/python -m mypy

aot-tpu: $(VENV)/.base $(VENV)/.libtpu
	$(BIN)/python -m experiments.aot_tpu

aot-gpu: $(VENV)/.base $(VENV)/.cuda
	$(BIN)/python -m experiments.aot_gpu

clean:
	rm -rf .venv .venv-newer .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted installation is done again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: PYTHON=$(PYTHON) must be Python 3.11 or newer; it is: $$($(PYTHON) --version 2>&1 | head -n 1)." \
	       "Name another one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.python $(INPUTS)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.python $(INPUTS)
	$(PIP_INSTALL) -e ".[test,notebooks,evaluate]"
	@touch $@ $(VENV)/.base

# The compiler for TPUs, out of the way of programs that would look for a TPU if it were installed.
$(VENV)/.libtpu: $(VENV)/.python $(INPUTS)
	rm -rf $(VENV)/tpu
	$(PIP_INSTALL) --no-deps --target $(VENV)/tpu libtpu
	@touch $@

# JAX's CUDA plug-in, with the compiler for GPUs but without CUDA, in the same way.
$(VENV)/.cuda: $(VENV)/.python $(INPUTS)
	rm -rf $(VENV)/gpu
	$(PIP_INSTALL) --no-deps --target $(VENV)/gpu jax-cuda13-plugin jax-cuda13-pjrt
	@touch $@
