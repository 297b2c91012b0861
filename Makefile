# make demo    the five kinds on a photograph: a picture, a table of agreement with torch, the plans, the figures
# make test    style, types and tests, in about seven minutes on two cores
# Both start from nothing: they make .venv and install what they need. Neither needs a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# The versions of an older, common GPU machine; NumPy 2.4 breaks Triton 3.6's interpreter.
OLDEST := .venv-oldest
WORKERS ?= auto

.PHONY: demo test test-all test-oldest lint figures clean

demo: $(READY)
	$(BIN)/python -m perf_plots.demo --out demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -q -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -q -m "smoke"
	$(OLDEST)/bin/triton-conv inspect

figures: $(READY)
	$(BIN)/python -m perf_plots

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip setuptools
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[test]"
	touch $@

$(OLDEST)/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -qq --upgrade pip setuptools
	$(OLDEST)/bin/python -m pip install -qq torch==2.13.0 triton==3.6.0 "numpy<2.4" --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
