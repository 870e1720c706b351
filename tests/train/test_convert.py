"""`edlm convert` as a user runs it: every option works, and what does not fit is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import log_history, run_convert
from transformers import AutoConfig

ONE_STEP = ("--steps", "1", "--warmup-steps", "0")


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


def test_options_reach_the_checkpoint(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    options = ["--block-length", "8", "--noise", "uniform", "--layout", "plain", "--token-shift"]
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *ONE_STEP, *options)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["block_size"] == 8
    assert config["tok_mask_half_life_ratio"] is None
    assert config["token_shift"] is True


AXES = [
    ("--pattern", "block_noisy"),
    ("--pattern", "bidirectional", "--token-shift"),
    ("--ar-loss-weight", "0.5"),
    ("--growth", "4,8,16"),
    ("--lora-rank", "4"),
    ("--schedule", "wsd", "--decay-ratio", "0.5"),
    ("--gradient-checkpointing", "--accumulate", "2"),
    ("--noise-copies", "2", "--bf16"),
]


LEARNS = ("--steps", "12", "--log-steps", "4", "--learning-rate", "3e-3")


@pytest.mark.parametrize("options", AXES, ids=lambda options: "".join(options))
def test_every_axis_learns_and_exports_what_it_trained(
    ar_directory: Path, problem_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options, "--check", *LEARNS)
    assert result.exit_code == 0, result.output
    assert "masked tokens differ" in result.output
    first, *_, last = log_history(tmp_path / "out", 12)
    assert last["loss"] < first["loss"]
    prompt_attention = AutoConfig.from_pretrained(tmp_path / "out").prompt_attention
    expected = {"--ar-loss-weight": "causal_grid", "bidirectional": "bidirectional"}
    named = [name for option, name in expected.items() if option in options]
    assert prompt_attention == (named or ["block_causal"])[0]


def test_the_loss_falls_and_the_log_says_where(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    options = ["--steps", "40", "--log-steps", "10", "--learning-rate", "3e-3", "--log-to"]
    result = run_convert(
        ar_directory, problem_file, tmp_path / "out", *options, "tensorboard", "--save-steps", "40"
    )
    assert result.exit_code == 0, result.output
    history = log_history(tmp_path / "out", 40)
    assert [line["step"] for line in history] == [10, 20, 30, 40]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    for line in history:
        assert line["tokens_per_second"] > 0
        assert {"loss/mask_0.00-0.25", "loss/mask_0.75-1.00"} <= line.keys()
        assert {f"loss/position_{position:02}" for position in range(16)} <= line.keys()
    assert list((tmp_path / "out/tensorboard").rglob("events.*"))


def test_a_dlm_of_shorter_blocks_teaches(
    ar_directory: Path, problem_file: Path, tmp_path: Path, losses: list[float]
) -> None:
    short = run_convert(ar_directory, problem_file, tmp_path / "short", "--block-length", "4")
    assert short.exit_code == 0, short.output
    seen = {}
    for weight in ("0", "0.5"):
        losses.clear()
        options = ["--teacher", str(tmp_path / "short"), "--distillation-weight", weight]
        result = run_convert(ar_directory, problem_file, tmp_path / weight, *options)
        assert result.exit_code == 0, result.output
        seen[weight] = list(losses)
    losses.clear()
    assert run_convert(ar_directory, problem_file, tmp_path / "alone").exit_code == 0
    assert seen["0"] == losses, "a teacher without weight changes nothing"
    assert seen["0.5"] != losses


def test_a_teacher_that_does_not_fit_is_named(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    options = [*ONE_STEP, "--token-shift", "--block-length", "4"]
    assert run_convert(ar_directory, problem_file, tmp_path / "shift", *options).exit_code == 0
    for teacher, message in (
        (tmp_path / "shift", "token_shift of the teacher"),
        (ar_directory, "is no block-diffusion checkpoint"),
        (tmp_path / "nothing", "cannot load the teacher"),
    ):
        result = run_convert(
            ar_directory, problem_file, tmp_path / "out", "--teacher", str(teacher)
        )
        assert result.exit_code == 1
        assert message in result.output


def test_a_dry_run_leaves_nothing(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row-length", "100"], "row length 100 is not a multiple of the block length 16"),
        (["--mask-token-id", "99999"], "mask token id 99999 is outside the vocabulary"),
        (["--half-life-ratio", "0"], "half_life_ratio must be above 0, got 0"),
        (["--row-length", "32"], "a row holds 32"),
        (["--row-length", "512", "--block-length", "512"], "block_length must be at most 256, the"),
        (["--growth", "4,8"], "growth must name rising block lengths"),
        (["--pattern", "block_noisy", "--ar-loss-weight", "1"], "ar_loss_weight must be 0 with"),
        (["--schedule", "wsd", "--decay-ratio", "1"], "must not be more than the 8 steps"),
        (["--warmup-steps", "9"], "warmup_steps (9) and the steps of the decay (0) must not be"),
        (["--attention", "xformers"], "attention 'xformers' computes in bf16 alone"),
        (["--lora-rank", "1000"], "LoRA rank must be 1 to 32"),
        (["--fsdp"], "fsdp needs several processes with a GPU each, got 1 and"),
    ],
)
def test_bad_options_are_named(
    ar_directory: Path, problem_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.output


def test_an_empty_file_is_named(ar_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    result = run_convert(ar_directory, tmp_path / "empty.jsonl", tmp_path / "out")
    assert result.exit_code == 1
    assert "empty.jsonl: no documents in it" in result.output


def test_rows_beyond_the_models_context_are_pointed_out(
    ar_directory: Path, problem_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--row-length", "512", "--dry-run"]
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "rows of 512 tokens are longer than the model's context of 256" in caplog.text


def test_missing_files_are_named(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    no_data = run_convert(ar_directory, tmp_path / "no.jsonl", tmp_path / "out")
    assert "no.jsonl does not exist" in no_data.output
    no_model = run_convert(tmp_path / "nothing", problem_file, tmp_path / "out")
    assert no_model.exit_code == 1
    assert "nothing" in no_model.output


def test_neither_model_nor_teacher_is_overwritten(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    own = run_convert(ar_directory, problem_file, ar_directory)
    taught = run_convert(ar_directory, problem_file, tmp_path, "--teacher", str(tmp_path))
    for result, role in ((own, "model"), (taught, "teacher")):
        assert result.exit_code == 1
        assert f"holds the {role}, which the export would replace" in result.output


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--half-life-ratio", "0.1", "--noise", "uniform"], "--noise position"),
        (["--decay-ratio", "0.2"], "--schedule wsd"),
        (["--lora-alpha", "32"], "--lora-rank"),
        (["--distillation-weight", "0.5"], "--teacher"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    ar_directory: Path, problem_file: Path, tmp_path: Path, options: list[str], needed: str
) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
    assert result.exit_code == 2
    # In a frame, and broken into lines.
    message = " ".join(result.output.replace("│", " ").split())
    assert f"Invalid value for {options[0]}: has no meaning without {needed}" in message


CHANGED = [
    (("--pattern", "bidirectional"), "pattern 'block_clean', not 'bidirectional'"),
    (("--steps", "12"), "steps 8, not 12"),
    (("--learning-rate", "2e-3"), "learning_rate 0.001, not 0.002"),
    (("--accumulate", "2"), "rows_per_step 4, not 8"),
    (("--lora-rank", "4"), "lora_rank None, not 4"),
]


def test_another_recipe_does_not_go_on_from_a_conversion(
    ar_directory: Path, problem_file: Path, tmp_path: Path, losses: list[float]
) -> None:
    """Its weights would be taken for those of the recipe that was asked for."""
    assert run_convert(ar_directory, problem_file, tmp_path / "out").exit_code == 0
    config = (tmp_path / "out/config.json").read_bytes()
    losses.clear()
    for options, message in CHANGED:
        result = run_convert(ar_directory, problem_file, tmp_path / "out", *options)
        assert result.exit_code == 1
        assert f"holds a conversion begun with {message}: go on with" in result.output
    assert (tmp_path / "out/config.json").read_bytes() == config
    free = ("--batch-size", "2", "--accumulate", "2", "--layout", "plain")
    result = run_convert(ar_directory, problem_file, tmp_path / "out", *free)
    assert result.exit_code == 0, result.output
    assert losses == []


def test_block_length_0_is_refused(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path, "--block-length", "0")
    assert result.exit_code == 2
    assert "block-length" in result.output


def test_growth_must_be_numbers(ar_directory: Path, problem_file: Path, tmp_path: Path) -> None:
    result = run_convert(ar_directory, problem_file, tmp_path, "--growth", "4,x")
    assert result.exit_code == 2
    assert "must be block lengths such as 4,8,16" in result.output


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vllm_edlm.cli import app;"
        "result = CliRunner().invoke(app, ['convert', '--help']); print(result.output);"
        "sys.exit(result.exit_code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for panel in ("Data", "Objective", "Optimiser", "Machine", "Result"):
        assert f"─ {panel} ─" in done.stdout
