"""`transformers.Trainer` with the block-diffusion loss; schedules, saves and resume are its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_edlm.train.data import PackedRows
from vllm_edlm.train.model import BlockDiffusionLM, join
from vllm_edlm.train.noise import Corruption, NoiseKind, corrupt, draw, numbers_needed


class TrainingDivergedError(RuntimeError):
    """The loss is not a number any more; checkpoints saved before stay as they are."""


@dataclass(frozen=True)
class Objective:
    """What is learned: block length, noise and the mask token.

    Attributes:
        half_life_ratio: lambda of Eq. 2; smaller masks later positions more. Unused by `uniform`.
        noise_copies: independently masked copies of a row in one forward.
        seed: keys the noise, together with epoch and row.
    """

    block_length: int
    mask_token_id: int
    noise: NoiseKind = "position"
    half_life_ratio: float = 0.1
    noise_copies: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_length", "noise_copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.half_life_ratio > 0:
            raise ValueError(f"half_life_ratio must be above 0, got {self.half_life_ratio}")
        if self.noise not in ("position", "uniform"):
            raise ValueError(f"noise must be 'position' or 'uniform', got {self.noise!r}")

    def corruptions(self, in_loss: Tensor, samples: list[int], epoch: int) -> list[Corruption]:
        """One corruption per noise copy for rows with the given global indices."""
        numbers = numbers_needed(self.noise, in_loss.shape[1], self.block_length)
        result = []
        for copy in range(self.noise_copies):
            uniforms = draw(self.seed, epoch, samples, copy, numbers).to(in_loss.device)
            noise = corrupt(self.noise, uniforms, in_loss, self.block_length, self.half_life_ratio)
            result.append(noise)
        return result


class ConversionTrainer(Trainer):
    """Trains a `BlockDiffusionLM` on `PackedRows`."""

    objective: Objective

    def __init__(
        self,
        model: BlockDiffusionLM,
        args: TrainingArguments,
        rows: PackedRows,
        objective: Objective,
    ) -> None:
        # The noise is drawn from the row's index, so no column may be dropped as unknown.
        args.remove_unused_columns = False
        super().__init__(model=model, args=args, train_dataset=rows)
        self.objective = objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite; no weight has been touched by it.
        """
        objective = self.objective
        epoch = int(self.state.epoch or 0)
        corruptions = objective.corruptions(inputs["in_loss"], inputs["sample"].tolist(), epoch)
        sequence = join(inputs, corruptions, objective.mask_token_id, objective.block_length)
        loss: Tensor = model(sequence)
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss became {loss.item()} at step {self.state.global_step}; "
                f"the last good checkpoint is kept in {self.args.output_dir}"
            )
        return (loss, None) if return_outputs else loss


def last_checkpoint(directory: Path) -> str | None:
    """The newest Trainer checkpoint in a directory, or None where there is none."""
    found: str | None = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    return found


def steps_done(checkpoint: str) -> int:
    """The optimizer steps behind a Trainer checkpoint."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
