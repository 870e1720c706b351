"""What `edlm convert --dry-run` says: counted, added up and measured; nothing changes by it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from vllm_edlm.cli import app
from vllm_edlm.train import step_cost
from vllm_edlm.train.command import recipe_defaults
from vllm_edlm.train.convert import prepare
from vllm_edlm.train.memory import Memory
from vllm_edlm.train.packing import NO_DOCUMENT
from vllm_edlm.train.plan import learning_rates, plan, render, sample
from vllm_edlm.train.recipe import Recipe
from vllm_edlm.train.step_cost import kept_bytes
from vllm_edlm.train.trainer import ConversionTrainer

Prepare = Callable[..., ConversionTrainer]


@pytest.fixture
def prepared(ar_directory: Path, problem_file: Path, tmp_path: Path) -> Prepare:
    """The trainer of the command's defaults, but for a small model, small rows and fp32."""
    small = {"row_length": 128, "batch_size": 2, "steps": 40, "bf16": False, "growth": ()}
    where = {"model": str(ar_directory), "data": str(problem_file), "output": tmp_path / "out"}

    def prepare_with(**changes: Any) -> ConversionTrainer:
        return prepare(Recipe(**(recipe_defaults() | small | where | changes)))[0]

    return prepare_with


def row(documents: list[int], in_loss: int) -> dict[str, Tensor]:
    return {
        "document_ids": torch.tensor(documents),
        "in_loss": torch.arange(len(documents)) < in_loss,
    }


def test_shares_are_of_the_first_rows_tokens() -> None:
    rows = [
        row([0, 0, 1, 1, 1, 1, 2, 2], in_loss=4),
        row([0, 0, 0, 0, 0, 0, NO_DOCUMENT, NO_DOCUMENT], in_loss=2),
        row([NO_DOCUMENT] * 8, in_loss=0),
    ]
    seen = sample(iter(rows), count=2)
    assert seen.rows == 2
    assert seen.tokens_per_document == 14 / 4
    assert seen.in_loss == 6 / 16
    assert seen.pad == 2 / 16


def test_a_plan_counts_what_the_trainer_will_do(prepared: Prepare) -> None:
    made = plan(prepared(batch_size=3, accumulate=2))
    assert made.rows_per_step == 6
    assert made.tokens_per_step == 6 * 128
    assert made.seconds_per_step == 2 * made.cost.seconds > 0
    assert 0 < made.cost.masked_tokens < made.cost.joint_tokens <= 2 * 3 * 128


def test_memory_follows_from_the_parameters(prepared: Prepare) -> None:
    trainer = prepared()
    weights = sum(p.nbytes for p in trainer.model.parameters())
    made = plan(trainer)
    memory = made.memory
    assert made.parameters == made.trainable == weights / 4
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, weights, 2 * weights)
    assert memory.gathered == weights, "the model has two layers, so all of it is whole at a time"
    assert memory.teacher == 0
    vocabulary = trainer.model.causal_lm.config.vocab_size
    assert memory.logits == 3 * 4 * made.cost.masked_tokens * vocabulary


def test_sums_by_how_the_model_is_spread() -> None:
    memory = Memory(
        weights=100, gradients=80, optimizer=160, gathered=30, teacher=5, activations=7, logits=3
    )
    assert memory.alone == 355
    assert memory.ddp == 435
    assert memory.fsdp(4) == 85 + 30 + 15


def test_frozen_weights_need_neither_gradients_nor_moments(prepared: Prepare) -> None:
    trainer = prepared(lora_rank=4)
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    made = plan(trainer)
    assert made.trainable == trained / 4 < made.parameters
    assert made.memory.gradients == trained
    assert made.memory.optimizer == 2 * trained


def test_checkpointing_keeps_less_and_stays_as_it_was(prepared: Prepare) -> None:
    made = plan(prepared())
    assert made.cost.activations_checkpointed < made.cost.activations
    assert not made.checkpointed
    assert made.memory.activations == made.cost.activations
    checkpointed = plan(prepared(gradient_checkpointing=True))
    assert checkpointed.checkpointed
    assert checkpointed.memory.activations == checkpointed.cost.activations_checkpointed
    assert checkpointed.cost.activations == made.cost.activations


def test_kept_bytes_are_counted_once_and_without_weights() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)

    def run() -> Tensor:
        hidden = x @ weight  # keeps x and the weight
        hidden = hidden.exp()  # keeps its result
        return (hidden * hidden).sum()  # keeps that again

    assert kept_bytes(run, [weight]) == 2 * 4 * 8 * 4
    assert kept_bytes(run, []) == (2 * 4 * 8 + 8 * 8) * 4


def test_weights_and_files_stay_untouched(prepared: Prepare) -> None:
    trainer = prepared()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    plan(trainer)
    assert all(torch.equal(w, before[name]) for name, w in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]


def test_learning_rates_are_those_of_the_schedule(prepared: Prepare) -> None:
    options = {"learning_rate": 1e-3, "warmup_steps": 10, "min_learning_rate_ratio": 0.5}
    cosine = learning_rates(prepared(**options))
    assert list(cosine) == [1, 10, 11, 20, 30, 40]
    assert cosine[1] == 0
    assert cosine[11] == 1e-3
    assert cosine[11] > cosine[20] > cosine[30] > cosine[40] > 0.5e-3
    stable = learning_rates(prepared(**options, schedule="wsd", decay_ratio=0.25))
    assert stable[11] == stable[20] == stable[30] == 1e-3
    assert stable[40] < 0.6e-3


def test_every_figure_says_where_it_comes_from(prepared: Prepare) -> None:
    made = plan(prepared())
    table = render(made)
    assert all(cell for column in table.columns for cell in column.cells)
    console = Console(file=StringIO(), width=300)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{made.parameters:,}" in text
    assert "2 of 128 tokens" in text
    assert "256 a step, 10,240 in all" in text


def test_a_batch_that_does_not_fit_is_named(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*args: Any) -> int:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB")

    monkeypatch.setattr(step_cost, "kept_bytes", too_much)
    with pytest.raises(ValueError, match=r"a batch of 2 rows of 128 tokens does not fit .*9 GiB"):
        plan(prepared())


def test_the_command_prints_it_and_leaves_the_output_alone(
    ar_directory: Path, problem_file: Path, tmp_path: Path
) -> None:
    options = ["--data", str(problem_file), "--output", str(tmp_path / "out"), "--dry-run"]
    small = ["--row-length", "128", "--batch-size", "2", "--steps", "5", "--no-bf16"]
    result = CliRunner().invoke(app, ["convert", str(ar_directory), *options, *small])
    assert result.exit_code == 0, result.output
    assert "time in all" in result.output
    assert not (tmp_path / "out").exists()
