"""Serving a checkpoint runs none of the code that comes with it."""

import shutil
from pathlib import Path

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import SMALL_ENGINE, Ask, Engine, Served, prompt
from traps import assert_code_is_live, assert_pickle_is_live, name_code, pickle_weights
from vllm import LLM


@pytest.fixture
def copy(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    path = checkpoint(CheckpointSpec(seed=11))
    return Path(shutil.copytree(path, tmp_path / "checkpoint"))


def test_classes_named_by_a_checkpoint_are_not_loaded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_code(copy, mark := tmp_path / "mark")
    assert_code_is_live(copy, mark, monkeypatch)
    engine = Engine.start(copy, Served(8, "block_causal"), enforce_eager=True)
    engine.assert_exact([Ask(prompt(20, seed=3))])
    assert engine.llm.get_tokenizer().decode([5, 6])
    assert not mark.exists()


def test_pickled_weights_are_refused(copy: Path, tmp_path: Path) -> None:
    pickle_weights(copy, mark := tmp_path / "mark")
    assert_pickle_is_live(mark)
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        LLM(model=str(copy), enforce_eager=True, **SMALL_ENGINE)
    assert not mark.exists()
