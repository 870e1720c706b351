# Everything runs from .venv, which `make setup` makes. Other targets set up by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint format tiny-math tiny-math-figures clean

setup: $(READY)

$(READY): pyproject.toml vllm_edlm/compat/environment.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[cpu,train,dev]'
	$(BIN)/python -m vllm_edlm.compat.environment
	touch $@

# Serves the committed checkpoint, asks it real questions over the OpenAI API, stops the server.
demo: setup
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
