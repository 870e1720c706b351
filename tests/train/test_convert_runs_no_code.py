"""Converting a model runs none of the code that comes with it, and never asks whether it may."""

from pathlib import Path

import pytest
from traps import assert_code_is_live, assert_pickle_is_live, name_code, pickle_weights
from typer.testing import CliRunner, Result

from vllm_edlm.cli import app


def run_convert(model: Path, data: Path, output: Path, *more: str) -> Result:
    """One step; whoever asks is told yes."""
    options = ["--row-length", "128", "--batch-size", "2", "--steps", "1", "--no-bf16", *more]
    command = ["convert", str(model), "--data", str(data), "--output", str(output), *options]
    return CliRunner().invoke(app, command, input="y\n" * 9)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def test_classes_named_by_a_model_are_not_loaded(
    ar_directory: Path,
    problem_file: Path,
    tmp_path: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name_code(ar_directory, mark)
    assert_code_is_live(ar_directory, mark, monkeypatch)
    result = run_convert(ar_directory, problem_file, tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.py"))
    assert not mark.exists()


@pytest.mark.parametrize("as_teacher", [False, True], ids=["model", "teacher"])
def test_a_model_that_needs_its_code_is_refused(
    ar_directory: Path, problem_file: Path, tmp_path: Path, mark: Path, as_teacher: bool
) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in ar_directory.iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())
    name_code(spoilt, mark, model_type="unheard_of")
    model, more = (
        (ar_directory, ["--teacher", str(spoilt), "--distillation-weight", "0.5"])
        if as_teacher
        else (spoilt, [])
    )
    result = run_convert(model, problem_file, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert "custom code" in result.stderr
    assert not mark.exists()


def test_pickled_weights_are_refused(
    ar_directory: Path, problem_file: Path, tmp_path: Path, mark: Path
) -> None:
    pickle_weights(ar_directory, mark)
    assert_pickle_is_live(mark)
    result = run_convert(ar_directory, problem_file, tmp_path / "out")
    assert result.exit_code == 1
    assert not mark.exists()
