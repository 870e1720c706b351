"""Where each request stands, on the CPU, and what that means for one step.

Everything a step needs to know about its requests follows from numbers the scheduler sent and
from their canvases, which come back from the device after every step, as its tokens do. So a
step knows beforehand which positions are masked, and waits for nothing.

Legend for shapes: S slots of the runner, N requests of the batch, B block length, T rows of
logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edlm.adaptive import length_ending_at
from vllm_edlm.canvas import open_canvas, open_entries
from vllm_edlm.compat.vllm_api import (
    InputBatch,
    LogprobsLists,
    async_copy_to_np,
    async_tensor_h2d,
)
from vllm_edlm.options import REVEAL_RULES, Options, RequestOptions
from vllm_edlm.step import Layout, LogitsRows, Step
from vllm_edlm.virtual_rows import Ints, block_start

NO_BLOCK = -1


@dataclass(frozen=True)
class OpenBlock:
    """The open block of a preempted request, to be taken up again.

    Attributes:
        start: first position of the block.
        length: its positions.
        steps_done: denoise steps it has had.
        canvas: B token ids, the mask token where a position is masked; on any device.
        logprobs: of the revealed positions, [B] rows by position, if the request wants them.
    """

    start: int
    length: int
    steps_done: int
    canvas: Sequence[int] | Tensor = ()
    logprobs: LogprobsLists | None = None


@dataclass(frozen=True)
class ReturningCanvases:
    """Canvases on their way from the device to the CPU.

    Attributes:
        slots: [N] whose they are.
        canvas: [N, B] token ids, not to be read before `wait`.
        arrived: the event after the copy, where there is a device to wait for.
    """

    slots: Ints
    canvas: Ints
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, slots: Ints, canvas_NB: Tensor) -> "ReturningCanvases":
        """Start the copy."""
        canvas = async_copy_to_np(canvas_NB)
        if not canvas_NB.is_cuda:
            return cls(slots, canvas, None)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(slots, canvas, arrived)

    def wait(self) -> Ints:
        """The canvases; they were copied before the tokens that the scheduler has seen."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.canvas


class BlockState:
    """Per-slot numbers of the requests in the runner, all arrays [S]."""

    def __init__(
        self,
        num_slots: int,
        options: Options,
        max_model_len: Callable[[], int],
        device: torch.device,
    ) -> None:
        """Begin with empty slots.

        Args:
            max_model_len: asked when it is needed: vLLM may lower it after this.
        """
        self.options = options
        self.max_model_len = max_model_len
        self.device = device
        self.origin = np.zeros(num_slots, dtype=np.int64)
        self.full_length = np.full(num_slots, options.block_length, dtype=np.int64)
        self.block_length = self.full_length.copy()
        self.threshold = np.zeros(num_slots, dtype=np.float32)
        self.rule = np.zeros(num_slots, dtype=np.int64)
        self.max_steps = np.ones(num_slots, dtype=np.int64)
        self.block_start = np.full(num_slots, NO_BLOCK, dtype=np.int64)
        self.steps_done = np.zeros(num_slots, dtype=np.int64)
        self.canvas = torch.full((num_slots, options.block_length), options.mask_token_id)
        self._returning: ReturningCanvases | None = None

    def add(
        self, slot: int, prompt_length: int, request: RequestOptions, open_block: OpenBlock | None
    ) -> None:
        """Take a request into `slot`, with its open block if it was preempted."""
        self.origin[slot] = prompt_length if self.options.blocks_follow_prompt else 0
        self.full_length[slot] = self.block_length[slot] = request.block_length
        self.threshold[slot] = request.threshold
        self.rule[slot] = REVEAL_RULES.index(request.rule)
        self.max_steps[slot] = request.max_steps
        self.block_start[slot] = NO_BLOCK
        if open_block is not None:
            self._take_canvases()
            self.block_start[slot] = open_block.start
            self.block_length[slot] = open_block.length
            self.steps_done[slot] = open_block.steps_done
            self.canvas[slot] = torch.as_tensor(open_block.canvas)

    def keep_canvases(self, step: Step, canvas_NB: Tensor) -> None:
        """Fetch the canvases as a step has left them; nothing waits for them here."""
        self._returning = ReturningCanvases.of(step.layout.slots, canvas_NB)

    def _take_canvases(self) -> None:
        if self._returning is not None:
            self.canvas[self._returning.slots] = torch.from_numpy(self._returning.wait())
            self._returning = None

    def layout(self, batch: InputBatch) -> Layout:
        """How the queries of `batch` lie on their grids."""
        slots = batch.idx_mapping_np[: batch.num_reqs]
        first = batch.num_computed_tokens_np.astype(np.int64)
        length = batch.num_scheduled_tokens.astype(np.int64)
        num_open = _num_drafts(batch)
        known = first + length - num_open
        origin = self.origin[slots]
        block_length = self._block_lengths(slots, known, first + length, num_open > 0)
        start = block_start(known, origin, block_length)
        if self.options.has_causal_past:
            # A prompt that attends token-causally is final wherever it is cut.
            start = np.where(known < origin, known, start)
        return Layout(slots, first, length, known, start, block_length, num_open)

    def _block_lengths(
        self, slots: Ints, known: Ints, end: Ints, denoises: NDArray[np.bool_]
    ) -> Ints:
        """[N] lengths of the open blocks, where the scheduler may choose them."""
        block_length, start = self.block_length[slots], self.block_start[slots]
        if self.options.adaptive_canvas is None:
            return block_length
        is_first, origin = start == NO_BLOCK, self.origin[slots]
        opens = denoises & (is_first | (known >= start + block_length))
        limit = self.max_model_len() - origin
        full_length = self.full_length[slots]
        chosen = length_ending_at(full_length, known - origin, end - origin, limit, is_first)
        return np.where(opens, chosen, block_length)

    def begin_step(self, batch: InputBatch) -> Step:
        """Derive the step of `batch` and count it for the blocks that it denoises."""
        self._take_canvases()
        layout = self.layout(batch)
        slots, start = layout.slots, layout.block_start
        denoises = layout.num_open > 0
        is_new = denoises & (self.block_start[slots] != start)
        steps_done = np.where(is_new, 0, self.steps_done[slots])
        self.block_start[slots] = np.where(denoises, start, self.block_start[slots])
        self.block_length[slots] = layout.block_length
        self.steps_done[slots] = steps_done + denoises
        # A shorter block has fewer steps: as many positions as asked are revealed in each.
        full_length = self.full_length[slots]
        max_steps = -(-self.max_steps[slots] * layout.block_length // full_length)
        steps_left = np.maximum(max_steps - steps_done, 1)
        offset = layout.known - start
        width = np.minimum(offset + layout.num_open, layout.block_length)
        rule = self.rule[slots]
        canvas, has_logits = self._open_canvases(slots, offset, width, is_new)
        ints = np.stack([layout.known, start, offset, width, steps_left, rule])
        known_N, start_N, offset_N, width_N, steps_left_N, rule_N = self._upload(ints)
        return Step(
            layout=layout,
            slots=batch.idx_mapping[: batch.num_reqs],
            known=known_N,
            block_start=start_N,
            offset=offset_N,
            width=width_N,
            steps_left=steps_left_N,
            rule=rule_N,
            is_new=self._upload(is_new),
            threshold=self._upload(self.threshold[slots]),
            canvas=canvas,
            masked=self._upload(has_logits) & (canvas == self.options.mask_token_id),
            rows=self._logits_rows(layout, has_logits, steps_done),
            num_rows_np=has_logits.sum(axis=1),
            rules_in_use=np.unique(rule).tolist(),
        )

    def _open_canvases(
        self, slots: Ints, offset: Ints, width: Ints, is_new: NDArray[np.bool_]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """Canvases [N, B] before a step, on the device, and which of their positions get
        logits, on the CPU: the masked ones."""
        offset_N, width_N = torch.from_numpy(offset), torch.from_numpy(width)
        mask_token_id = self.options.mask_token_id
        canvas_NB = open_canvas(
            self.canvas[slots], offset_N, torch.from_numpy(is_new), mask_token_id
        )
        masked_NB = open_entries(canvas_NB, offset_N, width_N) & (canvas_NB == mask_token_id)
        return self._upload(canvas_NB.numpy()), masked_NB.numpy()

    def _logits_rows(
        self, layout: Layout, has_logits: NDArray[np.bool_], steps_done: Ints
    ) -> LogitsRows:
        request, entry = np.nonzero(has_logits)
        position = layout.block_start[request] + entry
        query_start = np.cumsum(layout.length) - layout.length
        # Under token shift the position before predicts one. It is always in the query: a
        # block's first step commits the block before it, and reveals its first position.
        source = query_start[request] + position - layout.first[request] - self.options.token_shift
        cell = request * self.options.block_length + entry
        slot = layout.slots[request].astype(np.int64)
        # A block of B positions takes B steps at most, so no two draws share a counter.
        counter = position * self.full_length[slot] + steps_done[request]
        return LogitsRows(*self._upload(np.stack([source, cell, slot, position, counter])))

    def _upload(self, values: NDArray[np.generic]) -> Tensor:
        return async_tensor_h2d(values, device=self.device)


def _num_drafts(batch: InputBatch) -> Ints:
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        return np.zeros(batch.num_reqs, dtype=np.int64)
    return drafts.astype(np.int64)
