"""`edlm convert` as the tests run it, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from vllm_edlm.cli import app

SMALL = ("--row-length", "128", "--batch-size", "4", "--steps", "8", "--save-steps", "4")
FAST = ("--learning-rate", "1e-3", "--warmup-steps", "2", "--no-bf16")


def command(model: Path, data: Path, output: Path, *options: str) -> list[str]:
    places = ["convert", str(model), "--data", str(data), "--output", str(output)]
    return [*places, *SMALL, *FAST, *options]


def run_convert(model: Path, data: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(app, command(model, data, output, *options))


def log_history(output: Path, step: int) -> list[dict[str, float]]:
    state = (output / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text()
    history: list[dict[str, float]] = json.loads(state)["log_history"]
    return history
