# Everything runs in this checkout's own virtual environment and writes inside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt

# Threads of one training process; test workers get one each.
THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
WORKERS ?= 2
# PYTEST_ARGS='-k lora' narrows a test run.
PYTEST_ARGS ?=

CONFIG ?= examples/configs/lora_embedded.yaml
QUICKSTART := outputs/quickstart
# make quickstart UPDATES=20 : a short run, to see that everything works
UPDATES ?=
TRAIN_ARGS = --config $(CONFIG) --checkpoint_path $(QUICKSTART) --output_path $(QUICKSTART) $(if $(UPDATES),--updates $(UPDATES))
QUICKSTART_ARGS = $(TRAIN_ARGS) --output $(QUICKSTART)

# Once installed, nothing below needs a network, and nothing may try.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
RUN = $(OFFLINE) OMP_NUM_THREADS=$(THREADS)

.PHONY: help venv install install-test quality format test test-slow test-floors test-constraints quickstart quickstart-run docs docs-images bench bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z -]*:.*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed (tested: 3.11); make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test,quality]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

venv install: $(VENV)/.installed  ## the package and what it needs, in .venv
install-test: $(VENV)/.installed-test  ## ... and the test and quality tools

quality: $(VENV)/.installed-test  ## ruff (check and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy stable_cascade

format: $(VENV)/.installed-test  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: quality  ## quality, then the default tests (ten slowest and skip reasons at the end)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test  ## the tests marked slow, minutes long
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --timeout 3600 -m slow $(PYTEST_ARGS)

# The embedded cascade is trained and drawn with, and every pipeline called, at the lowest version of each requirement.
FLOORS := .venv-floors
test-floors:  ## the lowest versions that setup.py allows: the pipelines' tests and a short quickstart (torch is a CUDA build)
	rm -rf $(FLOORS)
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) tests/lowest_versions.py > $(FLOORS)/lowest.txt
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check --prefer-binary -r $(FLOORS)/lowest.txt \
	    pytest pytest-timeout pytest-xdist -e .
	$(OFFLINE) OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n $(WORKERS) tests/test_pipeline*.py tests/test_lora*.py \
	    tests/test_formats*.py tests/test_scheduler.py tests/test_prompts.py tests/test_tokens.py tests/test_vqgan.py
	$(MAKE) quickstart-run BIN=$(FLOORS)/bin UPDATES=5

test-constraints: $(VENV)/.installed  ## constraints.txt resolves for every Python that setup.py allows (asks the package index)
	$(BIN)/python tests/lowest_versions.py --ranges > $(VENV)/ranges.txt
	for version in 3.11 3.12 3.13 3.14; do \
	    $(BIN)/python -m pip install --disable-pip-version-check -q --dry-run --target $(VENV)/unused --python-version $$version \
	        --only-binary :all: -c constraints.txt -r $(VENV)/ranges.txt || exit 1; echo "resolves for Python $$version"; done

quickstart: $(VENV)/.installed quickstart-run  ## draw, train a LoRA on the embedded cascade, draw again

quickstart-run:
	rm -rf $(QUICKSTART)
	$(RUN) $(BIN)/python examples/quickstart.py before $(QUICKSTART_ARGS)
	$(RUN) $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
	    examples/train_lora.py $(TRAIN_ARGS)
	$(RUN) $(BIN)/python examples/quickstart.py after $(QUICKSTART_ARGS) $(if $(UPDATES),--measured 5)

docs: $(VENV)/.installed-docs  ## docs/configuration.md from the config dataclasses, then the site in site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo wrote docs/configuration.md and site/

docs-images: $(VENV)/.installed-test  ## draw the images of the pages anew, with the embedded cascade
	$(RUN) $(BIN)/python docs/images.py

bench: $(VENV)/.installed  ## ours and the peers in turns, scaled down, on this CPU; writes benchmarks/out/bench.json
	$(RUN) $(BIN)/python -m benchmarks.run --results

bench-gpu: $(VENV)/.installed  ## the same at real sizes with random weights, on a CUDA device
	$(RUN) $(BIN)/python -m benchmarks.run --scale gpu --results

clean:  ## remove .venv, caches, site and outputs/quickstart
	rm -rf $(VENV) $(FLOORS) $(QUICKSTART) site .mypy_cache .ruff_cache .pytest_cache build stable_cascade.egg-info
