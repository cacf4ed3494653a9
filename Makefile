# On a fresh machine: `make train` and `make test`. Both set up .venv first.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SUDO := $(if $(filter-out 0,$(shell id -u)),$(shell which sudo 2>/dev/null))
unexport PYTHONDONTWRITEBYTECODE # a program would compile 1,400 files every time it starts
# JAX with CUDA if there is an NVIDIA GPU
LOCK := $(if $(shell nvidia-smi -L 2>/dev/null),requirements-cuda.lock,requirements.lock)

help:
	@echo 'make setup               install into .venv what $(LOCK) pins'
	@echo 'make train [ARGS="…"]    train; ARGS are overrides, such as ARGS="model.mha_type=mla trainer.num_steps=50"'
	@echo 'make test                lint, types, all tests'
	@echo 'make lint                ruff and mypy only'
	@echo 'make browser             Chromium for the tests of chargpt play (Debian, Ubuntu)'
	@echo 'make bench               the tables of docs/results.md that need no other library (an hour)'
	@echo 'make gpu-check           compile for an H100 without a GPU (installs 6 GB into .venv-cuda)'
	@echo 'make gpu-bench           the first ten minutes on a GPU: tests, tables'
	@echo 'make lock                resolve the lock files again (needs uv)'
	@echo 'make clean               remove .venv and caches, keep runs'

setup: .venv/installed

.venv/installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'chargpt needs Python 3.11 or later, for example: make PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

train: setup
	$(BIN)/python main.py $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

browser: # where apt-get has no Chromium, or only a stub that needs snap, the tests of the page are skipped
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	$(SUDO) apt-get -qq update && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install --yes --no-install-recommends chromium >/dev/null; \
	command -v chromium || { echo 'apt-get has no Chromium here: the tests of the page are skipped'; exit 1; }

bench: setup
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/growth.py

gpu-check: .venv-cuda/installed
	JAX_PLATFORMS=cpu PYTHONPATH=src .venv-cuda/bin/python benchmarks/gpu_check.py $(ARGS)

gpu-bench: setup
	$(BIN)/python benchmarks/gpu_bench.py $(ARGS)

.venv-cuda/installed: requirements-cuda.lock
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r $<
	@touch $@

lock: # the newest jax for each version of Python
	for extras in '' -cuda; do \
		uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy requires-python \
			--extra dev --extra dashboard --extra search --extra joblib --extra slurm --extra play $${extras:+--extra cuda} \
			--generate-hashes --no-emit-index-url --no-annotate --no-header --output-file requirements$$extras.lock; \
	done

clean:
	rm -rf .venv .venv-cuda .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup train test lint browser bench gpu-check gpu-bench lock clean
