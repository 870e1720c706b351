"""`transformers.Trainer` with the block-diffusion loss; schedules, saves and resume are its own."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from vllm_edlm.train.bands import LossBands
from vllm_edlm.train.checkpoints import CheckpointingTrainer
from vllm_edlm.train.joint import IGNORED, JointCollator
from vllm_edlm.train.loss import masked_loss
from vllm_edlm.train.model import BlockDiffusionLM, TokenLosses
from vllm_edlm.train.objective import Objective


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is not a number any more; checkpoints saved before stay as they
    are, and no weight has been touched by it."""


class ConversionTrainer(CheckpointingTrainer):
    """Trains a `BlockDiffusionLM` on rows of `row_length` tokens, as `PackedRows` gives them.

    Losses of an optimizer step are divided by the number of its masked tokens in all processes
    and accumulated batches, so that how rows are spread over these changes nothing.
    """

    model: BlockDiffusionLM
    train_dataset: IterableDataset[dict[str, Tensor]]
    objective: Objective
    # `compute_loss` divides by counts of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: BlockDiffusionLM,
        args: TrainingArguments,
        rows: IterableDataset[dict[str, Tensor]],
        objective: Objective,
        row_length: int,
    ) -> None:
        self.objective = objective
        self.row_length = row_length
        self.rows_per_step = (
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        # The collator reads every column.
        args.remove_unused_columns = False
        collator = JointCollator(objective, args.max_steps, self.rows_per_step)
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collator)
        self._bands = LossBands(objective.block_length, self.args.device)
        self._rows_since_log = 0
        self._time_of_log: float | None = None

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step, and how many losses they ask for.

        Returns:
            The batches of this process, and the numbers [2] of masked tokens and of next tokens of
            all processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([_asked(batch) for batch in batches]).sum(dim=0)
        return batches, self.accelerator.reduce(counts.to(device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This process's share of the step's loss, times the processes that gradients average.

        Args:
            num_items_in_batch: the counts from `get_batch_samples`.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite, in any process.
        """
        losses: TokenLosses = model(inputs)
        loss = self._share(losses, inputs, num_items_in_batch)
        # All processes stop at the same step: one alone would leave the others waiting.
        self._check_finite("the loss", self.accelerator.reduce(loss.detach(), "sum"))
        self._observe(losses, inputs)
        loss = loss * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

    def _share(self, losses: TokenLosses, inputs: dict[str, Tensor], counts: Tensor) -> Tensor:
        p_mask = inputs["p_mask"][inputs["labels"] != IGNORED]
        loss = masked_loss(losses.masked, p_mask, counts[0])
        if self.objective.ar_loss_weight:
            mean = losses.next.sum() / counts[1].clamp(min=1)
            loss = loss + self.objective.ar_loss_weight * mean
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of a step's gradients, of all processes, before the optimizer sees them.

        Raises:
            TrainingDivergedError: it is NaN or infinite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        total = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        self._check_finite("the norm of the gradients", total)
        return norm

    def _check_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise TrainingDivergedError(
                f"{name} became {value.item()} at step {self.state.global_step}; "
                f"the last good checkpoint is kept in {self.args.output_dir}"
            )

    def _observe(self, losses: TokenLosses, inputs: dict[str, Tensor]) -> None:
        masked = inputs["labels"] != IGNORED
        step, steps = self.state.global_step, self.args.max_steps
        block_length = self.objective.block_length_at(step, steps)
        position = inputs["position_ids"][masked] % block_length
        self._bands.update(losses.masked, inputs["p_mask"][masked], position)
        self._rows_since_log += len(masked)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, beside what Trainer does, the loss by bands and data tokens per second."""
        if "loss" in logs and start_time is not None:
            logs |= self._bands.read(lambda totals: self.accelerator.reduce(totals, "sum"))
            logs["tokens_per_second"] = self._data_tokens_per_second(start_time)
        super().log(logs, start_time)

    def _data_tokens_per_second(self, start_time: float) -> float:
        """Tokens of rows, of all processes, since the last log; a joint sequence has about two
        for each."""
        now, since = time.time(), self._time_of_log or start_time
        rows = self._rows_since_log * self.args.world_size
        self._rows_since_log, self._time_of_log = 0, now
        return round(rows * self.row_length / (now - since), 1)


def _asked(batch: dict[str, Tensor]) -> Tensor:
    """Numbers [2] of masked tokens and of next tokens that a batch asks for."""
    masked = (batch["labels"] != IGNORED).sum()
    if "next_labels" not in batch:
        return torch.stack([masked, torch.zeros_like(masked)])
    return torch.stack([masked, (batch["next_labels"] != IGNORED).sum()])
