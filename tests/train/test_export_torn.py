"""A kill or a full disk in the middle of an export leaves the old one whole, or none at all."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_families import tiny_model
from transformers import PreTrainedTokenizerFast

import vllm_edlm.train.export as export_module
from vllm_edlm.train.export import export
from vllm_edlm.train.objective import Objective

OBJECTIVE = Objective(block_length=8, mask_token_id=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def old_export(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """An export in several shards, of another block length than the one that replaces it."""
    directory = tmp_path / "out"
    trained = tiny_model("qwen3", len(tokenizer))
    export(directory, trained, tokenizer, Objective(4, 2), max_shard_size="10KB")
    (directory / "checkpoints").mkdir()
    return directory


def test_a_new_export_replaces_the_old_one_and_nothing_else(
    old_export: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained = tiny_model("llama", len(tokenizer))
    # What a kill in the middle of writing leaves.
    (old_export / ".export").mkdir()
    (old_export / ".export/model-00001-of-00009.safetensors").touch()
    export(old_export, trained, tokenizer, OBJECTIVE)
    export(tmp_path / "fresh/out", trained, tokenizer, OBJECTIVE)
    (old_export / "checkpoints").rmdir()
    assert contents(old_export) == contents(tmp_path / "fresh/out")


class _KilledError(BaseException):
    """Stands for the process going away; no handler for errors sees it."""


def test_killed_while_moving_it_leaves_a_whole_export_or_none(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (tiny_model(family, len(tokenizer)) for family in ("qwen3", "llama"))
    export(tmp_path / "whole/out", new, tokenizer, OBJECTIVE)
    whole = contents(tmp_path / "whole/out")
    replace = Path.replace
    for moves in range(len(whole)):
        directory = tmp_path / str(moves) / "out"
        left = iter(range(moves))

        def killed(path: Path, target: Path, left: Iterator[int] = left) -> Path:
            if next(left, None) is None:
                raise _KilledError
            return replace(path, target)

        export(directory, old, tokenizer, Objective(4, 2), max_shard_size="10KB")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(_KilledError):
                export(directory, new, tokenizer, OBJECTIVE)
        assert not (directory / "config.json").exists(), f"torn after {moves} moves"
        export(directory, new, tokenizer, OBJECTIVE)
        assert contents(directory) == whole


def test_killed_while_writing_it_leaves_the_old_export(
    old_export: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old_export / "checkpoints").rmdir()
    before = contents(old_export)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise _KilledError

    monkeypatch.setattr(export_module, "save_file", killed)
    with pytest.raises(_KilledError):
        export(old_export, tiny_model("llama", len(tokenizer)), tokenizer, OBJECTIVE)
    assert contents(old_export) == before


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Make the system refuse to write more than `size` bytes into a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["at the tokenizer", "at the weights"])
def test_a_full_disk_is_named_and_leaves_the_old_export(
    old_export: Path, tokenizer: PreTrainedTokenizerFast, share: float
) -> None:
    (old_export / "checkpoints").rmdir()
    before = contents(old_export)
    size = int(max(len(before[name]) for name in before if name.startswith("token")) * share)
    trained = tiny_model("llama", len(tokenizer))
    with (
        pytest.raises(OSError, match=f"cannot write the export to {old_export}"),
        no_file_longer_than(size),
    ):
        export(old_export, trained, tokenizer, OBJECTIVE)
    assert contents(old_export) == before
