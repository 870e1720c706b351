"""Whatever goes wrong with a conversion is named, and costs no more than the last steps."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import command, run_convert
from torch import Tensor
from transformers import TrainerCallback

import vllm_edlm.train.trainer as trainer_module
from vllm_edlm.train.checkpoints import last_checkpoint
from vllm_edlm.train.model import BlockDiffusionLM, TokenLosses


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


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
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def nan_loss(losses: Tensor) -> Tensor:
    return losses * float("nan")


def nan_gradient(losses: Tensor) -> Tensor:
    """The same losses; the root of 0 has an infinite slope."""
    return losses + (losses - losses).sqrt()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nan_loss, "the loss became nan at step 5"),
        (nan_gradient, "the norm of the gradients became nan at step 5"),
    ],
)
def test_what_is_not_a_number_stops_before_it_reaches_a_weight(
    ar_directory: Path,
    problem_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Tensor], Tensor],
    message: str,
) -> None:
    forward, calls = BlockDiffusionLM.forward, iter(range(100))

    def breaks_later(self: Any, batch: Any) -> TokenLosses:
        losses = forward(self, batch)
        return losses._replace(masked=fault(losses.masked)) if next(calls) == 5 else losses

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionLM, "forward", breaks_later)
        # A save after every step: not even the one of the fault may be a checkpoint.
        result = run_convert(ar_directory, problem_file, output, "--save-steps", "1")
    assert result.exit_code == 1
    assert message in result.output
    assert last_checkpoint(output / "checkpoints") == output / "checkpoints/checkpoint-5"
    assert not (output / "model.safetensors").exists()
    assert run_convert(ar_directory, problem_file, output).exit_code == 0
    assert run_convert(ar_directory, problem_file, tmp_path / "whole").exit_code == 0
    assert weights(output) == weights(tmp_path / "whole")


def test_a_bad_line_met_while_training_is_named_and_can_be_mended(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    good = problem_file.read_text()
    lines = good.splitlines(keepends=True)
    lines[39] = lines[39][:9] + "\n"
    data.write_text("".join(lines))
    in_order = ("--shuffle-buffer", "0", "--save-steps", "1")
    result = run_convert(ar_directory, data, output, *in_order)
    assert result.exit_code == 1
    assert f"error: {data}: line 40: not valid JSON" in result.output
    assert last_checkpoint(output / "checkpoints") is not None, "it came before any step"
    data.write_text(good)
    assert run_convert(ar_directory, data, output, *in_order).exit_code == 0
    assert run_convert(ar_directory, data, tmp_path / "whole", *in_order).exit_code == 0
    assert weights(output) == weights(tmp_path / "whole")


HELD = """
import sys, time
from vllm_edlm.cli import app
from vllm_edlm.train.trainer import ConversionTrainer

method, step = sys.argv[1], int(sys.argv[2])
run = getattr(ConversionTrainer, method)

def held(self, *args, **kwargs):
    if self.state.global_step == step:
        print("held", flush=True)
        time.sleep(3600)
    return run(self, *args, **kwargs)

setattr(ConversionTrainer, method, held)
sys.argv[1:] = sys.argv[3:]
app()
"""


@pytest.mark.parametrize(
    ("method", "step"),
    [("create_optimizer", 0), ("training_step", 6), ("_save_optimizer_and_scheduler", 8)],
)
def test_a_killed_process_goes_on_where_it_was(
    ar_directory: Path, problem_file: Path, tmp_path: Path, method: str, step: int
) -> None:
    """Killed as no test in one process can be: before any step, within one, within a save."""
    output = tmp_path / "out"
    arguments = [method, f"{step}", *command(ar_directory, problem_file, output)]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", HELD, *arguments], stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdout is not None
    assert b"held\n" in process.stdout, (tmp_path / "stderr").read_text()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    assert run_convert(ar_directory, problem_file, output).exit_code == 0
    assert run_convert(ar_directory, problem_file, tmp_path / "whole").exit_code == 0
    assert weights(output) == weights(tmp_path / "whole")


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(
    ar_directory: Path, problem_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer_module.ConversionTrainer._save_scaler

    def full(self: Any, output_dir: str) -> None:
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(trainer_module.ConversionTrainer, "_save_scaler", full)
    result = run_convert(ar_directory, problem_file, tmp_path / "out")
    assert result.exit_code == 1
    assert "checkpoint-8: [Errno 28] No space left" in result.output
    last = last_checkpoint(tmp_path / "out/checkpoints")
    assert last == tmp_path / "out/checkpoints/checkpoint-4"
