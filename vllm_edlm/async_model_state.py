"""Block diffusion on Model Runner V2 with async scheduling: canvases stay on the device.

The scheduler's numbers place a step exactly, except that it knows fewer tokens than the device:
those of the step before are missing. A position that it takes for open may have been revealed, and
emitted; what the canvas holds counts. If it holds all of the block, the step is the commit.

Legend for shapes: S slots of the runner, N requests of the batch, B block length.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edlm.block_state import NO_BLOCK, BlockState, OpenBlock
from vllm_edlm.canvas import emitted_run
from vllm_edlm.compat.vllm_api import (
    InputBatch,
    NewRequestData,
    RequestState,
    Sampler,
)
from vllm_edlm.model_state import BlockDiffusionModelState
from vllm_edlm.options import Options
from vllm_edlm.sampler import BlockDiffusionSampler
from vllm_edlm.step import Step
from vllm_edlm.virtual_rows import Ints


class AsyncBlockState(BlockState):
    """`BlockState` whose canvases [S, B] are on the device and never come back."""

    def __init__(
        self,
        num_slots: int,
        options: Options,
        max_model_len: Callable[[], int],
        device: torch.device,
    ) -> None:
        super().__init__(num_slots, options, max_model_len, device)
        self.canvas = self.canvas.to(device)

    def keep_canvases(self, step: Step, canvas_NB: Tensor) -> None:
        """Keep the canvases as a step has left them."""
        self.canvas[step.slots] = canvas_NB

    def open_block(self, slot: int) -> OpenBlock | None:
        """The open block of the request in `slot`, if it has had a denoise step."""
        start, steps_done = int(self.block_start[slot]), int(self.steps_done[slot])
        if start == NO_BLOCK:
            return None
        length = int(self.block_length[slot])
        return OpenBlock(start, length, steps_done, self.canvas[slot].clone())

    def _open_canvases(
        self, slots: Ints, offset: Ints, width: Ints, is_new: NDArray[np.bool_]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """Canvases [N, B] before a step, and which of their positions get logits: all that are
        not known here, masked or not."""
        canvas_NB = self.canvas[self._upload(slots)]
        entry_B = np.arange(self.options.block_length)
        is_open_NB = (entry_B >= offset[:, None]) & (entry_B < width[:, None])
        is_new_N1 = self._upload(is_new)[:, None]
        return canvas_NB.masked_fill(is_new_N1, self.options.mask_token_id), is_open_NB


class AsyncSampler(BlockDiffusionSampler):
    """Denoises canvases that are ahead of the scheduler."""

    def _emit(
        self, canvas: Tensor, step: Step, input_batch: InputBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As without async scheduling, from where the device stands; a block that was emitted
        whole before the step has been run clean, and is final."""
        emitted = self.req_states.total_len.gpu[step.slots] - step.block_start
        tokens, count = emitted_run(canvas, emitted, step.width, self.mask_token_id)
        commits = (step.width > step.offset) & (emitted >= step.width)
        seq_lens = input_batch.seq_lens[: input_batch.num_reqs]
        return tokens, count, (seq_lens - step.block_start).masked_fill(commits, 0)


class AsyncModelState(BlockDiffusionModelState):
    """State of a block-diffusion model in the runner, one step ahead of the scheduler."""

    block_state_type = AsyncBlockState
    blocks: AsyncBlockState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot_of: dict[str, int] = {}
        # Of requests that have left the runner: preempted ones come back.
        self.left: dict[str, OpenBlock] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take in a new or resumed request."""
        super().add_request(req_index, new_req_data)
        self.slot_of[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        """Keep the open block of a request that is finished or preempted; vLLM does not say
        which."""
        slot = self.slot_of.pop(req_id, None)
        if slot is not None and (block := self.blocks.open_block(slot)) is not None:
            self.left[req_id] = block

    def _open_block(self, new_req_data: NewRequestData) -> OpenBlock | None:
        """The open block of a resumed request; those of finished ones are dropped."""
        preempted: frozenset[str] = getattr(new_req_data, "preempted", frozenset())
        self.left = {key: block for key, block in self.left.items() if key in preempted}
        return self.left.pop(new_req_data.req_id, None)

    def _follow_scheduler(
        self, step: Step, input_batch: InputBatch, req_states: RequestState
    ) -> None:
        """It is behind: here the runner's own count of tokens rules."""

    def custom_sampler(self, sampler: Sampler) -> tuple[Any, Any] | None:
        """The sampler that denoises the canvases (vLLM: in place of `Sampler`)."""
        return AsyncSampler(self, sampler), None
