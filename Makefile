# `make demo` and `make test` are all a newcomer needs; both make their environment first.
#   PYTHON=python3.10 make test    the leg with Detectron2's compiled ops
PYTHON ?= python3
# Every interpreter has its own environment, so that switching between them costs nothing.
VENV = $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# Test processes; each runs on one thread.
JOBS ?= 2
# Files of tests; all if empty.
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench docs

help:
	@echo "make demo    teacher, plain and distilled student on the digits set: a table and a picture"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation, in output/site"
	@echo "make bench   the numbers of benchmarks/ again (hours; resumable)"

env:
	@$(PYTHON) -c "" >/dev/null 2>&1 || { echo "error: $(PYTHON) does not run; install Python 3.10 or later, or name it: make demo PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: env
	@$(BIN)/python tools/demo.py

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	$(BIN)/mkdocs build --strict

bench: env
	$(BIN)/python benchmarks/bm_performance.py
	$(BIN)/python tools/compare.py benchmarks/comparison.yaml
	$(BIN)/python tools/compare.py benchmarks/segmentation.yaml
	$(BIN)/python tools/compare.py benchmarks/instances.yaml
	$(BIN)/python tools/compare.py benchmarks/classification.yaml
