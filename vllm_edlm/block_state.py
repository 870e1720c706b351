"""Where each request stands, on the CPU, and what that means for one step.

Everything a step needs to know about its requests follows from numbers the scheduler sent, so
no step reads the device. The only device state of a request is its canvas, kept in vLLM's
`RequestState.draft_tokens`.

Legend for shapes: S slots of the runner, N requests of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edlm.compat.vllm_api import InputBatch, async_tensor_h2d
from vllm_edlm.options import Options
from vllm_edlm.virtual_rows import Ints, block_start

NO_BLOCK = -1


@dataclass(frozen=True)
class Step:
    """One step's view of its requests; tensors [N] on the device, in batch order.

    Attributes:
        slots: index into the runner's per-request state.
        known: positions whose token is known before the step.
        block_start: first position of the open block.
        offset: known positions of the open block.
        width: end of the open block within the block; equal to `offset` where the request is
            still in its prompt and denoises nothing.
        steps_left: denoise steps the block may still take, this one included.
        is_new: bool, the block has had no denoise step.
        threshold: float32, the confidence that reveals a position.
        num_open_np: [N] on the CPU, rows of logits, one for each open position.
        offset_np: [N] on the CPU, `offset`.
    """

    slots: Tensor
    known: Tensor
    block_start: Tensor
    offset: Tensor
    width: Tensor
    steps_left: Tensor
    is_new: Tensor
    threshold: Tensor
    num_open_np: Ints
    offset_np: Ints


@dataclass(frozen=True)
class OpenBlock:
    """The open block of a preempted request, to be taken up again.

    Attributes:
        start: first position of the block.
        steps_done: denoise steps it has had.
        canvas: B token ids, the mask token where a position is masked.
    """

    start: int
    steps_done: int
    canvas: Sequence[int]


class BlockState:
    """Per-slot numbers of the requests in the runner, all arrays [S]."""

    def __init__(self, num_slots: int, options: Options, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.origin = np.zeros(num_slots, dtype=np.int64)
        self.threshold = np.zeros(num_slots, dtype=np.float32)
        self.max_steps = np.ones(num_slots, dtype=np.int64)
        self.block_start = np.full(num_slots, NO_BLOCK, dtype=np.int64)
        self.steps_done = np.zeros(num_slots, dtype=np.int64)
        self.restored_canvas: dict[int, Sequence[int]] = {}

    def add(
        self,
        slot: int,
        prompt_length: int,
        threshold: float,
        max_steps: int,
        open_block: OpenBlock | None,
    ) -> None:
        """Take a request into `slot`, with its open block if it was preempted."""
        self.origin[slot] = prompt_length if self.options.bidirectional_prompt else 0
        self.threshold[slot] = threshold
        self.max_steps[slot] = max_steps
        self.block_start[slot] = NO_BLOCK
        self.restored_canvas.pop(slot, None)
        if open_block is not None:
            self.block_start[slot] = open_block.start
            self.steps_done[slot] = open_block.steps_done
            self.restored_canvas[slot] = open_block.canvas

    def restore_canvases(self, draft_tokens: Tensor) -> None:
        """Write the canvases of requests that came back into `draft_tokens` [S, B]."""
        for slot, canvas in self.restored_canvas.items():
            draft_tokens[slot] = async_tensor_h2d(
                list(canvas), dtype=draft_tokens.dtype, device=self.device
            )
        self.restored_canvas.clear()

    def begin_step(self, batch: InputBatch) -> Step:
        """Derive the step of `batch` and count it for the blocks that it denoises."""
        slots = batch.idx_mapping_np[: batch.num_reqs]
        num_open = _num_drafts(batch)
        end = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        known = (end - num_open).astype(np.int64)
        start = block_start(known, self.origin[slots], self.options.block_length)
        denoises = num_open > 0
        is_new = denoises & (self.block_start[slots] != start)
        steps_done = np.where(is_new, 0, self.steps_done[slots])
        self.block_start[slots] = np.where(denoises, start, self.block_start[slots])
        self.steps_done[slots] = steps_done + denoises
        steps_left = np.maximum(self.max_steps[slots] - steps_done, 1)
        offset = known - start
        width = np.minimum(offset + num_open, self.options.block_length)
        ints = np.stack([known, start, offset, width, steps_left])
        known_N, start_N, offset_N, width_N, steps_left_N = self._upload(ints)
        return Step(
            slots=batch.idx_mapping[: batch.num_reqs],
            known=known_N,
            block_start=start_N,
            offset=offset_N,
            width=width_N,
            steps_left=steps_left_N,
            is_new=self._upload(is_new),
            threshold=self._upload(self.threshold[slots]),
            num_open_np=num_open,
            offset_np=offset,
        )

    def _upload(self, values: NDArray[np.generic]) -> Tensor:
        return async_tensor_h2d(values, device=self.device)


def _num_drafts(batch: InputBatch) -> Ints:
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        return np.zeros(batch.num_reqs, dtype=np.int64)
    return drafts.astype(np.int64)
