"""Where each request stands, on the CPU, and what that means for one step.

Everything a step needs to know about its requests follows from numbers the scheduler sent, so
no step reads the device. The only device state of a request is its canvas, kept in vLLM's
`RequestState.draft_tokens`.

Legend for shapes: S slots of the runner, N requests of the batch, T rows of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edlm.compat.vllm_api import InputBatch, LogprobsLists, async_tensor_h2d
from vllm_edlm.options import REVEAL_RULES, Options, RequestOptions
from vllm_edlm.virtual_rows import Ints, block_start

NO_BLOCK = -1


@dataclass(frozen=True)
class Layout:
    """How a batch's queries lie on their block grids, all [N] on the CPU.

    Attributes:
        slots: index into the runner's per-request state.
        first: first position of the query.
        length: positions in the query.
        known: positions whose token is known before the step.
        block_start: first position of the open block.
        num_open: open positions; 0 where the request is still in its prompt.
    """

    slots: Ints
    first: Ints
    length: Ints
    known: Ints
    block_start: Ints
    num_open: Ints


@dataclass(frozen=True)
class LogitsRows:
    """The rows of logits of a step, one for each open position; tensors [T].

    Attributes:
        cell: flat index into the batch's canvases [N, B].
        slot: the request's slot.
        position: position in the request's text.
        counter: number of the draw for the position, unlike any other of the request.
    """

    cell: Tensor
    slot: Tensor
    position: Tensor
    counter: Tensor

    def tile(self, rows: slice) -> "LogitsRows":
        """Some of the rows."""
        return LogitsRows(self.cell[rows], self.slot[rows], self.position[rows], self.counter[rows])


@dataclass(frozen=True)
class Step:
    """One step's view of its requests; tensors [N] on the device, in batch order.

    Attributes:
        layout: the batch on the CPU.
        slots: index into the runner's per-request state.
        known: positions whose token is known before the step.
        block_start: first position of the open block.
        offset: known positions of the open block.
        width: end of the open block within the block; equal to `offset` where the request is
            still in its prompt and denoises nothing.
        steps_left: denoise steps the block may still take, this one included.
        rule: index of the reveal rule.
        is_new: bool, the block has had no denoise step.
        threshold: float32, the reveal rule's parameter.
        rows: the rows of logits.
        rules_in_use: the values of `rule`, on the CPU.
    """

    layout: Layout
    slots: Tensor
    known: Tensor
    block_start: Tensor
    offset: Tensor
    width: Tensor
    steps_left: Tensor
    rule: Tensor
    is_new: Tensor
    threshold: Tensor
    rows: LogitsRows
    rules_in_use: Sequence[int]


@dataclass(frozen=True)
class OpenBlock:
    """The open block of a preempted request, to be taken up again.

    Attributes:
        start: first position of the block.
        steps_done: denoise steps it has had.
        canvas: B token ids, the mask token where a position is masked.
        logprobs: of the revealed positions, [B] rows by position, if the request wants them.
    """

    start: int
    steps_done: int
    canvas: Sequence[int] = ()
    logprobs: LogprobsLists | None = None


class BlockState:
    """Per-slot numbers of the requests in the runner, all arrays [S]."""

    def __init__(self, num_slots: int, options: Options, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.origin = np.zeros(num_slots, dtype=np.int64)
        self.block_length = np.full(num_slots, options.block_length, dtype=np.int64)
        self.threshold = np.zeros(num_slots, dtype=np.float32)
        self.rule = np.zeros(num_slots, dtype=np.int64)
        self.max_steps = np.ones(num_slots, dtype=np.int64)
        self.block_start = np.full(num_slots, NO_BLOCK, dtype=np.int64)
        self.steps_done = np.zeros(num_slots, dtype=np.int64)
        self.restored: dict[int, OpenBlock] = {}

    def add(
        self, slot: int, prompt_length: int, request: RequestOptions, open_block: OpenBlock | None
    ) -> None:
        """Take a request into `slot`, with its open block if it was preempted."""
        self.origin[slot] = prompt_length if self.options.blocks_follow_prompt else 0
        self.block_length[slot] = request.block_length
        self.threshold[slot] = request.threshold
        self.rule[slot] = REVEAL_RULES.index(request.rule)
        self.max_steps[slot] = request.max_steps
        self.block_start[slot] = NO_BLOCK
        self.restored.pop(slot, None)
        if open_block is not None:
            self.block_start[slot] = open_block.start
            self.steps_done[slot] = open_block.steps_done
            self.restored[slot] = open_block

    def take_restored(self) -> dict[int, OpenBlock]:
        """Open blocks that came back, by slot, whose device state has yet to be written."""
        restored, self.restored = self.restored, {}
        return restored

    def layout(self, batch: InputBatch) -> Layout:
        """How the queries of `batch` lie on their grids."""
        slots = batch.idx_mapping_np[: batch.num_reqs]
        first = batch.num_computed_tokens_np.astype(np.int64)
        length = batch.num_scheduled_tokens.astype(np.int64)
        num_open = _num_drafts(batch)
        known = first + length - num_open
        origin = self.origin[slots]
        start = block_start(known, origin, self.block_length[slots])
        if self.options.has_causal_past:
            # A prompt that attends token-causally is final wherever it is cut.
            start = np.where(known < origin, known, start)
        return Layout(slots, first, length, known, start, num_open)

    def begin_step(self, batch: InputBatch) -> Step:
        """Derive the step of `batch` and count it for the blocks that it denoises."""
        layout = self.layout(batch)
        slots, start = layout.slots, layout.block_start
        denoises = layout.num_open > 0
        is_new = denoises & (self.block_start[slots] != start)
        steps_done = np.where(is_new, 0, self.steps_done[slots])
        self.block_start[slots] = np.where(denoises, start, self.block_start[slots])
        self.steps_done[slots] = steps_done + denoises
        steps_left = np.maximum(self.max_steps[slots] - steps_done, 1)
        offset = layout.known - start
        width = np.minimum(offset + layout.num_open, self.block_length[slots])
        rule = self.rule[slots]
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
            rows=self._logits_rows(layout, steps_done),
            rules_in_use=np.unique(rule).tolist(),
        )

    def _logits_rows(self, layout: Layout, steps_done: Ints) -> LogitsRows:
        request = np.repeat(np.arange(len(layout.slots)), layout.num_open)
        run_start = np.cumsum(layout.num_open) - layout.num_open
        position = np.arange(len(request)) - run_start[request] + layout.known[request]
        # The runner's warm-up offers drafts past the end of a block; a scheduler never does.
        entry = np.minimum(position - layout.block_start[request], self.options.block_length - 1)
        cell = request * self.options.block_length + entry
        slot = layout.slots[request].astype(np.int64)
        # A block of B positions takes B steps at most, so no two draws share a counter.
        counter = position * self.block_length[slot] + steps_done[request]
        return LogitsRows(*self._upload(np.stack([cell, slot, position, counter])))

    def _upload(self, values: NDArray[np.generic]) -> Tensor:
        return async_tensor_h2d(values, device=self.device)


def _num_drafts(batch: InputBatch) -> Ints:
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        return np.zeros(batch.num_reqs, dtype=np.int64)
    return drafts.astype(np.int64)
