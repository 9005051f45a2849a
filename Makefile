# Every target does its own set-up: a virtual environment in .venv, made with $(PYTHON) (3.11 or
# newer) when it is missing and brought up to date when pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Compiled functions are kept here between runs; a cold start only takes longer.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
# XLA calls each load of a cached function an error because of two tuning hints in its target.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo test slow bench docs lint wheel lowest clean

demo: $(VENV)/.installed
	$(BIN)/python examples/eight_schools.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --durations 15

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow --durations 15 --timeout 3600

bench: $(VENV)/.installed
	set -e; for script in tests/benchmarks/[a-z]*.py; do $(BIN)/python "$$script"; done

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

wheel: $(VENV)/.installed
	$(BIN)/python tests/packaging/check_wheel.py

# The fast suite on the lowest versions that pyproject.toml admits.
lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vflow needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev,plots]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml tests/packaging/lowest.txt
	$(MAKE) VENV=$(VENV)-lowest $(VENV)-lowest/bin/python
	$(VENV)-lowest/bin/python -m pip install --quiet -c tests/packaging/lowest.txt -e '.[dev,plots]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest .jax_cache dist site
