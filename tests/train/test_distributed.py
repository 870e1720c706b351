"""The same training, however its rows are spread over processes and accumulated batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

STEPS = 4


def run(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`edlm convert` on CPU processes that reduce over gloo."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else [])]
    fast = ["--no-bf16", "--learning-rate", "1e-3", "--warmup-steps", "1", "--dtype", "float32"]
    small = ["--row-length", "64", "--steps", str(STEPS), "--save-steps", "2", "--log-steps", "1"]
    return subprocess.run(
        [*command, "tests.train.distributed_worker", "convert", *fast, *small, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def losses(output: Path) -> list[float]:
    state = output / f"checkpoints/checkpoint-{STEPS}/trainer_state.json"
    return [line["loss"] for line in json.loads(state.read_text())["log_history"]]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def test_processes_and_accumulation_change_nothing(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    noise = ["--noise", "uniform", "--noise-copies", "2"]
    axis = [*noise, "--growth", "4,16", "--ar-loss-weight", "0.5"]
    for name, processes, batch, accumulate in (
        ("whole", 1, 4, 1),
        ("accumulated", 1, 2, 2),
        ("two", 2, 1, 2),
    ):
        options = ["--batch-size", str(batch), "--accumulate", str(accumulate), *axis]
        places = [str(ar_directory), "--data", str(problem_file), "--output", str(tmp_path / name)]
        done = run(processes, *places, *options)
        assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS
    for name in ("accumulated", "two"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
        torch.testing.assert_close(
            weights(tmp_path / name), weights(tmp_path / "whole"), rtol=1e-4, atol=1e-5
        )


def test_all_processes_stop_when_one_diverges(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    places = [str(ar_directory), "--data", str(problem_file), "--output", str(tmp_path / "out")]
    done = run(2, *places, "--batch-size", "2", EDLM_TEST_NAN="1,3")
    assert done.returncode != 0
    assert done.stderr.count("error: the loss became nan at step 3") == 2, done.stderr
    assert (tmp_path / "out/checkpoints/checkpoint-2").is_dir()
    assert not (tmp_path / "out/model.safetensors").exists()


def test_sharded_processes_train_and_resume_the_same(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    places = [str(ar_directory), "--data", str(problem_file)]
    axis = ["--lora-rank", "4", "--check"]
    alone = run(1, *places, "--output", str(tmp_path / "alone"), "--batch-size", "4", *axis)
    assert alone.returncode == 0, alone.stderr
    sharded = [*places, "--output", str(tmp_path / "fsdp"), "--batch-size", "2", "--fsdp", *axis]
    for _ in range(2):
        done = run(2, *sharded, EDLM_TEST_FSDP="1")
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
        torch.testing.assert_close(
            weights(tmp_path / "fsdp"), weights(tmp_path / "alone"), rtol=1e-4, atol=1e-5
        )
        shutil.rmtree(tmp_path / f"fsdp/checkpoints/checkpoint-{STEPS}")


def test_sharding_computes_in_bf16_and_sums_in_fp32(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    found = []
    for name, options, environment in (
        ("ddp", [], {}),
        ("fsdp", ["--fsdp"], {"EDLM_TEST_FSDP": "1"}),
    ):
        places = [str(ar_directory), "--data", str(problem_file), "--output", str(tmp_path / name)]
        done = run(2, *places, "--batch-size", "2", "--bf16", *options, **environment)
        assert done.returncode == 0, done.stderr
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=2e-3)
