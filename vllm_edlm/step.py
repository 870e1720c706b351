"""What one step does to its requests: their queries, their open blocks, their rows of logits.

Legend for shapes: N requests of the batch, B block length, T rows of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from vllm_edlm.virtual_rows import Ints


@dataclass(frozen=True)
class Layout:
    """How a batch's queries lie on their block grids, all [N] on the CPU.

    Attributes:
        slots: index into the runner's per-request state.
        first: first position of the query.
        length: positions in the query.
        known: positions whose token is known before the step.
        block_start: first position of the open block.
        block_length: its length, as long as the model's own length does not cut it.
        num_open: open positions; 0 where the request is still in its prompt.
    """

    slots: Ints
    first: Ints
    length: Ints
    known: Ints
    block_start: Ints
    block_length: Ints
    num_open: Ints

    @property
    def open_start(self) -> Ints:
        """[N] start of the open block, the end of the query where there is none."""
        return np.where(self.num_open > 0, self.block_start, self.first + self.length)


@dataclass(frozen=True)
class LogitsRows:
    """The rows of logits of a step, one for each masked position; tensors [T].

    With async scheduling some of the positions may not be masked any more; their rows are not
    looked at.

    Attributes:
        source: token of the step whose hidden state predicts the position.
        cell: flat index into the batch's canvases [N, B].
        slot: the request's slot.
        position: position in the request's text.
        counter: number of the draw for the position, unlike any other of the request.
    """

    source: Tensor
    cell: Tensor
    slot: Tensor
    position: Tensor
    counter: Tensor

    def tile(self, rows: slice) -> "LogitsRows":
        """Some of the rows."""
        return LogitsRows(*(getattr(self, field.name)[rows] for field in fields(self)))


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
        canvas: [N, B] token ids before the step, the mask token where a position is masked.
        masked: [N, B] bool, the masked positions.
        rows: the rows of logits.
        num_rows_np: [N] on the CPU, rows of logits of each request.
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
    canvas: Tensor
    masked: Tensor
    rows: LogitsRows
    num_rows_np: Ints
    rules_in_use: Sequence[int]
