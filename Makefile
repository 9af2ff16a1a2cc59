# Each target makes what it needs: the first call creates .venv and installs, later ones start at once.
# `PYTHON=python3.12 make test` picks the interpreter; `make test ARGS="-k noise_ceiling"` hands on options.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help pretrain test test-slow check bench docs ui clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

pretrain: $(VENV)/.installed  ## pretrain on the embedded data set, then adapt to subject 5 (ARGS: options of foundation.pretrain)
	$(BIN)/python -m foundation.pretrain $(ARGS)
	$(BIN)/adapt --subject 5 --sessions 3
	@printf '\nNext: `make ui` shows both runs in MLflow; tick them and press Compare.\n'

test: $(VENV)/.installed-dev  ## run the tests (ARGS: options of pytest)
	$(BIN)/pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev  ## run the tests that take long or need ../shared/data
	$(BIN)/pytest -m slow $(ARGS)

check: $(VENV)/.installed-dev  ## ruff, pyright, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev  ## measure the benchmarks, which `make test` only runs, and with the types of arguments checked
	$(BIN)/pytest tests/benchmarks --benchmark-enable -o addopts=--import-mode=importlib $(ARGS)

docs: $(VENV)/.installed-docs  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build --fail-on-warning --nitpicky --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

ui: $(VENV)/.installed  ## open MLflow's UI on http://127.0.0.1:5000
	$(BIN)/python -m foundation.ui $(ARGS)

clean:  ## remove .venv, caches and build outputs; stores, checkpoints and runs in your home are kept
	rm -rf $(VENV) build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's whole output goes to a log; on the terminal, the large downloads and, if it fails, the end of the log.
define install
@echo "Installing $(1) into $(VENV); the first time this takes a few minutes and 3 to 4 GB. Log: $(VENV)/install.log"
@set -o pipefail; \
$(BIN)/pip install -e '$(1)' 2>&1 | tee $(VENV)/install.log | sed -unE \
	-e '/(Downloading|Using cached|Processing).*\.whl.*MB\)/{s/.*(Downloading|Using cached|Processing) ([^ ]*\/)?/  /;s/-cp3[^ ]*|-py[23][^ ]*/ /;p}' \
	-e '/^Installing collected/s/:.*/ .../p' \
	|| { tail -n 30 $(VENV)/install.log >&2; exit 1; }
endef

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(call install,.)
	@touch $@

# mamba-ssm without its CUDA extension, for the test that compares our scan with its Triton kernels, interpreted on the
# CPU. Not in the dev extra: it builds against the torch that is installed, and most of what it depends on is for GPUs.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(call install,.[dev])
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/pip install --quiet --no-build-isolation --no-deps 'mamba-ssm>=2.2.5,<3' \
	  || echo "mamba-ssm can't be installed; the test of its kernels will skip" >&2
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/pip
	$(call install,.[docs])
	@touch $(VENV)/.installed $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("manybrains needs Python 3.11 or newer; %s is %d.%d: set PYTHON" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
