# Two commands do everything on a fresh machine: `make demo` and `make test`.
# `make PYTHON=/path/to/python ...` chooses the interpreter; otherwise the newest that really runs is taken.

PYTHON ?= $(shell for v in 3.14 3.13 3.12 3.11; do \
	python$$v -c 'import sys, venv, ensurepip; assert sys.version_info[:2] == tuple(map(int, "'$$v'".split(".")))' \
	2>/dev/null && echo python$$v && break; done)
# One environment for each Python version, so that a change of interpreter cannot mix two.
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready

# What builds the pages.
DOCS := .venv-docs

# jax and its CUDA compiler, for machines without a GPU; apart from the others, as it is large and Linux only.
GPU_COMPILE := .venv-gpu-compile

.PHONY: ready demo test test-slow test-all test-gpu test-gpu-compile gpu-compile-ready docs bench table lint clean

# The environment alone.
ready: $(READY)

demo: $(READY)
	$(VENV)/bin/python -m experiments demo

# A worker for each core, each test file in one piece: what its tests share is made once. In the order of
# tests/conftest.py.
WORKERS := --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" $(WORKERS) --maxprocesses 8

# Compiled as users' programs are; the default layer is compiled faster (tests/conftest.py).
test-slow: $(READY)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(VENV)/bin/python -m pytest -m "slow or gpu" $(WORKERS) --maxprocesses 2

test-all: test test-slow

# On a machine with a GPU, in an environment whose jax sees it: make test-gpu VENV=/path/to/it
test-gpu:
	XLA_FLAGS="$(XLA_FLAGS) --xla_gpu_deterministic_ops=true" $(VENV)/bin/python -m pytest -m gpu tests/gpu

test-gpu-compile: gpu-compile-ready
	JAX_PLATFORMS=cpu $(GPU_COMPILE)/bin/python -m pytest tests/gpu_compile --numprocesses auto --maxprocesses 2

gpu-compile-ready: $(GPU_COMPILE)/.ready

# Into docs/_build; a warning is an error.
docs: $(DOCS)/.ready
	JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx -W --keep-going --quiet -b html docs docs/_build
	@echo "docs/_build/index.html"

bench: $(READY)
	$(VENV)/bin/python -m experiments bench steps
	$(VENV)/bin/python -m experiments bench loop
	$(VENV)/bin/python -m experiments bench selection
	$(VENV)/bin/python -m experiments bench conv
	$(VENV)/bin/python -m experiments bench step

table: $(READY)
	$(VENV)/bin/python -m experiments table --write

lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
	$(VENV)/bin/python -m basedpyright --pythonpath $(VENV)/bin/python; else echo "types: checked by Python 3.12 or later, with the newest jax"; fi

# Made in one go or not at all: .ready is written last.
$(READY): requirements.txt
	@test -n "$(PYTHON)" || { echo "no Python between 3.11 and 3.14 with venv was found: install one, or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

$(DOCS)/.ready: requirements-docs.txt
	@test -n "$(PYTHON)" || { echo "no Python between 3.11 and 3.14 with venv was found: install one, or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.txt
	touch $@

$(GPU_COMPILE)/.ready: requirements-gpu-compile.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "compiling for a GPU wants Python 3.12 or later: make test-gpu-compile PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv --clear $(GPU_COMPILE)
	$(GPU_COMPILE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gpu-compile.txt
	touch $@

clean:
	rm -rf .venv-* .native .programs docs/_build
