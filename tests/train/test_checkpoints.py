"""A training that is killed, or runs out of disk, while it writes any file of a checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments, set_seed

from vllm_edlm.train.checkpoints import (
    MANIFEST,
    CheckpointError,
    CheckpointingTrainer,
    is_complete,
    last_checkpoint,
    seal,
    steps_done,
)

FILES = [
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    MANIFEST,
]
Fault = Callable[[Path], None]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)  # a resume without the generator's state would show

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(self.dropout(x)) - x.sum(-1, keepdim=True)).square().mean()}


def train(directory: Path, steps: int = 6, kept: int | None = 2) -> dict[str, Tensor]:
    """Train from the last checkpoint, or from the start, and save every two steps."""
    set_seed(0)
    model = Regression()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",  # the same whatever `steps` is
        save_steps=2,
        save_total_limit=kept,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"x": torch.full((4,), float(i))} for i in range(8)]
    trainer = CheckpointingTrainer(model, arguments, train_dataset=rows)
    last = last_checkpoint(directory)
    trainer.train(resume_from_checkpoint=last and str(last))
    return model.state_dict()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def break_writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Fault], None]:
    """Let a fault happen the next time that a file is written."""

    def breaking(file: str, fault: Fault) -> None:
        def wrap(owner: Any, writer: str, argument: int) -> None:
            write = getattr(owner, writer)

            def broken(*args: Any, **kwargs: Any) -> Any:
                result = write(*args, **kwargs)
                path = Path(args[argument])
                if path.name == file:
                    monkeypatch.undo()
                    fault(path)
                return result

            monkeypatch.setattr(owner, writer, broken)

        wrap(safetensors.torch, "save_file", 1)
        wrap(torch, "save", 1)
        wrap(TrainerState, "save_to_json", 1)
        wrap(Path, "write_text", 0)

    return breaking


class KilledError(BaseException):
    """Stands for the process going away: nobody's except clause may catch it."""


def killed_after(path: Path) -> None:
    raise KilledError


def killed_within(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    raise KilledError


def disk_full(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("file", FILES)
def test_a_kill_in_the_middle_of_any_file_loses_only_the_steps_since_the_last_save(
    file: str,
    tmp_path: Path,
    break_writer: Callable[[str, Fault], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    uninterrupted = train(tmp_path / "whole")
    parts = tmp_path / "parts"
    train(parts, steps=2, kept=1)
    break_writer(file, killed_within)
    with pytest.raises(KilledError):
        train(parts, kept=1)
    assert names(parts) == {"checkpoint-2", "checkpoint-4"}, "the good one outlives the attempt"
    assert last_checkpoint(parts) == parts / "checkpoint-2"
    assert f"passing over {parts / 'checkpoint-4'}" in caplog.text
    resumed = train(parts, kept=1)
    assert names(parts) == {"checkpoint-6"}
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_is_named_and_the_last_checkpoint_kept(
    file: str, tmp_path: Path, break_writer: Callable[[str, Fault], None]
) -> None:
    train(tmp_path, steps=2)
    break_writer(file, disk_full)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-4: .*No space left"):
        train(tmp_path)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    train(directory, steps=4)
    return directory


@pytest.mark.parametrize("damage", [remove, truncate, empty])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    file: str, damage: Fault, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(trained / "checkpoint-4") == set(FILES)
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for original in (trained / f"checkpoint-{step}").iterdir():
            (checkpoint / original.name).write_bytes(original.read_bytes())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not caplog.records
    damage(tmp_path / "checkpoint-4" / file)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path / "checkpoint-4") in caplog.text


SHARDED = ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp", "rng_state_1.pth"]


@pytest.mark.parametrize("file", SHARDED)
def test_shards_of_all_processes_belong_to_a_checkpoint(file: str, tmp_path: Path) -> None:
    for name in SHARDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"shard")
    seal(tmp_path)
    assert is_complete(tmp_path)
    remove(tmp_path / file)
    assert not is_complete(tmp_path)


def test_old_files_do_not_make_up_for_missing_ones(
    tmp_path: Path, break_writer: Callable[[str, Fault], None]
) -> None:
    """A damaged checkpoint is written again, and that is cut short when the damage is mended."""
    train(tmp_path, steps=4)
    truncate(tmp_path / "checkpoint-4/model.safetensors")
    break_writer("model.safetensors", killed_after)
    with pytest.raises(KilledError):
        train(tmp_path)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_torn_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """Two newer torn ones: they must not make the good ones look superfluous."""
    train(tmp_path, steps=2)
    for torn in ("checkpoint-7", "checkpoint-9"):
        (tmp_path / torn).mkdir()
        (tmp_path / torn / "model.safetensors").write_bytes(b"torn")
    train(tmp_path, steps=4)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_without_a_limit_all_checkpoints_stay(tmp_path: Path) -> None:
    train(tmp_path, kept=None)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_newest_is_by_number_of_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1")
        seal(tmp_path / name)
    last = last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-10"
    assert last is not None
    assert steps_done(last) == 10


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nothing") is None
