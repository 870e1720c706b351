# Everything runs from .venv, which `make setup` makes. Other targets set up by themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint format bench soak tiny-math tiny-math-figures findings capacity clean

setup: $(READY)

$(READY): pyproject.toml vllm_edlm/compat/environment.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[cpu,dev]'
	$(BIN)/python -m vllm_edlm.compat.environment
	touch $@

# Serves the committed checkpoint, asks it real questions over the OpenAI API, stops the server.
demo: setup
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Measures every table of benchmarks/: hours on two idle cores; needs tiny-math's AR model.
bench: setup
	$(BIN)/edlm bench --output benchmarks/results

# Trains tiny-math and converts it: half an hour on two idle cores; goes on where it stopped.
tiny-math: setup
	PYTHON=$(BIN)/python examples/convert/tiny_math.sh

# Measures both models as served by vLLM, into examples/checkpoints/tiny-math.
tiny-math-figures: setup
	PYTHON=$(BIN)/python examples/convert/evaluate.sh

# Reproduces the paper's findings in miniature: half an hour of one core; goes on where it stopped.
findings: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.findings

# Mixed traffic at twice the capacity for half an hour: nothing wrong, stuck or leaking.
soak: setup
	$(BIN)/python -m benchmarks.soak

# Writes benchmarks/capacity.md from benchmarks/results.
capacity: setup
	$(BIN)/edlm capacity

clean:
	rm -rf $(VENV) build *.egg-info
