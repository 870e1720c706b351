"""`edlm convert` as a user runs it: it learns, resumes exactly, stops on NaN, names bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner, Result

import vllm_edlm.train.trainer as trainer_module
from vllm_edlm.cli import app


def run_convert(model: Path, data: Path, output: Path, *options: str) -> Result:
    small = ["--row-length", "128", "--batch-size", "4", "--steps", "8", "--save-steps", "4"]
    fast = ["--learning-rate", "1e-3", "--warmup-steps", "2", "--no-bf16"]
    command = ["convert", str(model), "--data", str(data), "--output", str(output)]
    return CliRunner().invoke(app, [*command, *small, *fast, *options])


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every training loss, in order."""
    seen: list[float] = []
    compute = trainer_module.ConversionTrainer.compute_loss

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(trainer_module.ConversionTrainer, "compute_loss", spy)
    return seen


class _KilledError(Exception):
    """Stands for the machine going away in the middle of a step."""


class _KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise _KilledError


def test_resuming_after_a_kill_gives_the_same_losses_and_weights(
    ar_directory: Path,
    problem_file: Path,
    tmp_path: Path,
    losses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_convert(ar_directory, problem_file, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    uninterrupted = list(losses)
    assert len(uninterrupted) == 8

    losses.clear()
    start = trainer_module.ConversionTrainer.__init__

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.add_callback(_KillAfter(6))

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.ConversionTrainer, "__init__", killed)
        first = run_convert(ar_directory, problem_file, tmp_path / "parts")
    assert isinstance(first.exception, _KilledError)
    assert losses == uninterrupted[:6]

    losses.clear()
    second = run_convert(ar_directory, problem_file, tmp_path / "parts")
    assert second.exit_code == 0, second.output
    assert losses == uninterrupted[4:], "goes on from the save at step 4, with the same noise"
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_finished_training_is_only_exported_again(
    ar_directory: Path, problem_file: Path, tmp_path: Path, losses: list[float]
) -> None:
    assert run_convert(ar_directory, problem_file, tmp_path / "out").exit_code == 0
    exported = tmp_path / "out/model.safetensors"
    before = exported.read_bytes()
    exported.unlink()
    losses.clear()
    again = run_convert(ar_directory, problem_file, tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert losses == []
    assert exported.read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_with_the_last_checkpoint_kept(
    ar_directory: Path, problem_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = trainer_module.BlockDiffusionLM.forward
    calls = iter(range(100))

    def breaks_later(self: Any, sequence: Any) -> torch.Tensor:
        loss: torch.Tensor = forward(self, sequence)
        return loss * float("nan") if next(calls) == 5 else loss

    monkeypatch.setattr(trainer_module.BlockDiffusionLM, "forward", breaks_later)
    result = run_convert(ar_directory, problem_file, tmp_path / "out")
    assert result.exit_code == 1
    assert "the loss became nan at step 5" in result.output
    assert (tmp_path / "out/checkpoints/checkpoint-4").is_dir()
    assert not (tmp_path / "out/model.safetensors").exists()


def test_options_reach_the_checkpoint(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    options = ["--steps", "1", "--block-length", "8", "--noise", "uniform", "--layout", "plain"]
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["block_size"] == 8
    assert config["tok_mask_half_life_ratio"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row-length", "100"], "row length 100 is not a multiple of the block length 16"),
        (["--mask-token-id", "99999"], "mask token id 99999 is outside the vocabulary"),
        (["--half-life-ratio", "0"], "half_life_ratio must be above 0, got 0"),
        (["--row-length", "32"], "a row holds 32"),
    ],
)
def test_bad_options_are_named(
    ar_directory: Path, problem_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.output


def test_missing_files_are_named(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    no_data = run_convert(ar_directory, tmp_path / "no.jsonl", tmp_path / "out")
    assert "no.jsonl does not exist" in no_data.output
    no_model = run_convert(tmp_path / "nothing", problem_file, tmp_path / "out")
    assert no_model.exit_code == 1
    assert "nothing" in no_model.output


def test_block_length_0_is_refused(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path, "--block-length", "0")
    assert result.exit_code == 2
    assert "block-length" in result.output
