"""Checkpoints of a training that may be killed, or run out of disk, at any moment.

Trainer writes a checkpoint file by file. Here a list of these files and their sizes is written last
of all: a checkpoint is complete when every file of its list has its size, whatever the files are
(one process or several, DDP or FSDP, whole or sharded). Only a complete one is resumed from, and
older ones go only when a newer one is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; complete ones stay as they are."""


class CheckpointingTrainer(Trainer):
    """`Trainer` whose checkpoints are complete or known not to be.

    `save_total_limit` counts complete ones. All nodes see one output directory, or each saves on
    its own (`save_on_each_node`), as Trainer itself demands.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Trainer would count torn checkpoints and remove old ones before the new one is complete.
        self._checkpoints_kept = self.args.save_total_limit
        self.args.save_total_limit = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save at the current step, then remove what is not needed any more.

        Raises:
            CheckpointError: a file could not be written, say because the disk is full.
        """
        directory = Path(str(self.args.output_dir))
        checkpoint = directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save and checkpoint.exists():
                shutil.rmtree(checkpoint)  # torn, and its files must not mix with new ones
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write {checkpoint}: {error}; earlier checkpoints are kept, and the same "
                "command goes on from the last one"
            ) from error
        if self.args.should_save:
            _remove_old(directory, self._checkpoints_kept)


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete: its files are on disk, and no more are to come."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    # No newline at the end: cut short anywhere, it is no JSON.
    (checkpoint / MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is there as it was written."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a directory, None where there is none.

    Newer ones that are not complete are passed over, each with a warning that names it.
    """
    for checkpoint in _newest_first(directory):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("passing over %s: its save was cut short", checkpoint)
    return None


def steps_done(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def _newest_first(directory: Path) -> list[Path]:
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in directory.glob(f"{prefix}*") if path.is_dir()]
    checkpoints = [path for path in found if path.name.removeprefix(prefix).isdigit()]
    return sorted(checkpoints, key=steps_done, reverse=True)


def _remove_old(directory: Path, kept: int | None) -> None:
    """Keep the newest complete checkpoints, so many of them (None: all), and nothing torn."""
    checkpoints = _newest_first(directory)
    needed = [checkpoint for checkpoint in checkpoints if is_complete(checkpoint)][:kept]
    for checkpoint in set(checkpoints) - set(needed):
        shutil.rmtree(checkpoint)
