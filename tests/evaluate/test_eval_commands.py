"""`edlm eval`: what is wrong is said before an engine starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import vllm
from checkpoints import CheckpointFactory, CheckpointSpec
from typer.testing import CliRunner, Result

from vllm_edlm.cli import app
from vllm_edlm.evaluate import engine


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm, "LLM", refuse)
    monkeypatch.setattr(engine, "LLM", refuse)


@pytest.fixture
def model(checkpoint: CheckpointFactory) -> str:
    return str(checkpoint(CheckpointSpec(block_length=8)))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n')
    return str(path)


def run(tmp_path: Path, *words: str) -> Result:
    result = CliRunner().invoke(app, ["eval", *words, "--output", str(tmp_path / "results")])
    assert not isinstance(result.exception, AssertionError), result.exception
    return result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "1.5"), "diffusion_threshold must be a number in (0, 1], got 1.5"),
        (("--reveal", "best"), "diffusion_reveal must be one of"),
        (("--max-steps", "9"), "diffusion_max_steps must be an integer from 1 to 8, got 9"),
        (("--match", "regex"), "match 'regex' needs a pattern"),
        (("--engine-args", "{"), "--engine-args must be a JSON object"),
        (("--engine-args", "[1]"), "--engine-args must be a JSON object, got [1]"),
        (("--task", "gsm8k"), "--task has no meaning with --data"),
        (("--num-fewshot", "3"), "--num-fewshot has no meaning with --data"),
        (("--ar", "nowhere/to/be/found"), "cannot load the model nowhere/to/be/found"),
    ],
)
def test_bad_options(
    tmp_path: Path, model: str, questions: str, words: tuple[str, ...], message: str
) -> None:
    result = run(tmp_path, "accuracy", model, "--data", questions, *words)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", ["accuracy", "order"])
def test_an_empty_file(tmp_path: Path, model: str, command: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    result = run(tmp_path, command, model, "--data", str(path))
    assert result.exit_code == 1
    assert "empty.jsonl: no questions in it" in result.stderr


def test_neither_questions_nor_tasks(tmp_path: Path, model: str) -> None:
    result = run(tmp_path, "accuracy", model)
    assert result.exit_code == 1
    assert "give either --data or --task" in result.stderr


def test_an_unknown_task(tmp_path: Path, model: str) -> None:
    result = run(tmp_path, "accuracy", model, "--task", "no_such_task")
    assert result.exit_code == 1
    assert "unknown task 'no_such_task'" in result.stderr


@pytest.mark.parametrize("command", ["accuracy", "order"])
def test_a_model_that_is_none_of_ours(
    tmp_path: Path, model: str, questions: str, command: str
) -> None:
    config = Path(model, "config.json")
    ar = tmp_path / "ar"
    ar.mkdir()
    stock = json.loads(config.read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (ar / "config.json").write_text(json.dumps(stock))
    result = run(tmp_path, command, str(ar), "--data", questions)
    assert result.exit_code == 1
    assert "is not a block-diffusion model" in result.stderr
    assert "Qwen3ForCausalLM" in result.stderr


def test_the_ar_parent_is_no_diffusion_model(tmp_path: Path, model: str, questions: str) -> None:
    result = run(tmp_path, "accuracy", model, "--data", questions, "--ar", model)
    assert result.exit_code == 1
    assert f"the AR parent {model} is a block-diffusion model (EfficientDLM)" in result.stderr


def test_drift_writes_table_and_plot(
    tmp_path: Path, model: str, checkpoint: CheckpointFactory
) -> None:
    other = checkpoint(CheckpointSpec(layout="plain", seed=5))
    result = run(tmp_path, "drift", model, "--ar", str(other))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "drift.json",
        "drift.md",
        "drift.png",
    }
    content = json.loads((tmp_path / "results" / "drift.json").read_text())
    assert {row["part"] for row in content["rows"]} == {
        "attention", "FFN", "norms", "embeddings", "head",
    }  # fmt: skip
    assert {"command", "commit", "CPU", "torch"} <= set(content["facts"])
