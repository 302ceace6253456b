# Two commands do everything on a fresh machine with Python 3.11+:
#   make quickstart   runs the whole lifecycle on this machine, no download of weights or data
#   make test         passes all tests
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Torch goes in first and alone, pinned, so that nothing later chooses another build. To take a build of
# your own choice (another version, CPU only, ROCm), run e.g. `make install TORCH="torch==2.12.0"`, or put it
# into $(VENV) yourself: a torch that is already there is kept.
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format clean bench bench-trainer bench-sampler bench-concurrency bench-recovery \
        bench-snapshots \
        test-unit test-parity test-contract test-journeys test-faults test-docs test-clients test-families soak

help: ## this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "homefire needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing homefire into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install --editable '.[engine,sdk,plot,dev]'
	@touch $@

install: $(VENV)/.installed ## create .venv and install homefire with everything it needs

quickstart: install ## start homefire, train, sync, sample, evaluate, branch; stop everything again
	$(BIN)/homefire quickstart $(ARGS)

test: install ## all tests, with a time budget per layer
	$(BIN)/python tests/layers.py

test-unit test-parity test-contract test-journeys test-faults test-docs: install ## one layer
	$(BIN)/python tests/layers.py $(@:test-%=%)

test-clients: install ## every version of every client, then docs/compatibility.md
	$(BIN)/python tests/layers.py clients
	$(BIN)/python tests/contract/matrix.py --update

.PHONY: test-gpu
test-gpu: install ## on a machine with an NVIDIA GPU: numbers, kernels, memory, trainer and sampler
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu tests/gpu

test-families: install ## every model family, packed and sampled, against Hugging Face
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/parity/test_families.py

soak: install ## the long suites: up to an hour
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m soak --timeout 3600 tests

check: install ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: install ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## start-up, memory and overhead of the lifecycle, as ratios
	$(BIN)/python benchmarks/lifecycle.py

bench-trainer: install ## the training engine beside the matrix rate, a padded loop and peft
	$(BIN)/python benchmarks/trainer $(ARGS)

bench-sampler: install ## the sampling engine beside bare matrix products and other engines
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sampler

bench-snapshots: install ## sizes, encode and decode, save to first token, stall and chains of snapshots
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/snapshots $(ARGS)

bench-concurrency: install ## adaptive windows beside the best fixed one, on five loads
	$(BIN)/python benchmarks/concurrency $(ARGS)

bench-recovery: install ## what the journal, a kill, and more at once than there is room for cost
	$(BIN)/python benchmarks/recovery $(ARGS)

clean: ## remove what the tests and the build left here
	rm -rf build dist .venvs .pytest_cache .ruff_cache .hypothesis quickstart-out
