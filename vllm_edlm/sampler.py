"""One denoise step for every open block of a batch."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from vllm_edlm.block_state import Step
from vllm_edlm.canvas import choose_tokens, emitted_run, entries
from vllm_edlm.compat.vllm_api import InputBatch, RequestState, SamplerOutput, async_tensor_h2d
from vllm_edlm.reveal import reveal

if TYPE_CHECKING:
    from vllm_edlm.model_state import BlockDiffusionModelState


class BlockDiffusionSampler:
    """Reveals tokens of the canvases and emits each block's new known run.

    Stands in for vLLM's `Sampler` in Model Runner V2. The step that the model state has
    prepared says where each canvas lies.

    Legend for shapes: N requests, B block length, T rows of logits (open positions).
    """

    # The runner counts output tokens for penalties only where this is a tensor.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, state: "BlockDiffusionModelState", req_states: RequestState) -> None:
        self.state = state
        self.req_states = req_states
        self.block_length = state.options.block_length
        self.mask_token_id = state.options.mask_token_id

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """The model state takes each request's options; nothing is left to do."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Denoise once.

        Args:
            logits: [T, V], a row per open position, requests in batch order.

        Returns:
            `num_sampled` [N] tokens emitted and `num_rejected` [N] positions of the query
            whose KV is not final after the step; `sampled_token_ids` [N, B].
        """
        step = self.state.step
        if step is None:
            return self._empty_output(input_batch)
        canvas = self.req_states.draft_tokens[step.slots]
        if logits.shape[0] > 0:
            canvas = self._denoise(canvas, logits, step)
            self.req_states.draft_tokens[step.slots] = canvas
        seq_lens = input_batch.seq_lens[: input_batch.num_reqs]
        tokens, count = emitted_run(canvas, step.offset, step.width, self.mask_token_id)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=count.to(torch.int32),
            # A block completed just now was partly masked when its KV was written.
            num_rejected=(seq_lens - step.block_start).to(torch.int32),
        )

    def _denoise(self, canvas: Tensor, logits: Tensor, step: Step) -> Tensor:
        """Canvas [N, B] after revealing what the rules choose."""
        token, confidence = choose_tokens(logits, self.mask_token_id)
        cell = self._cells(step)
        token_NB = canvas.flatten().scatter(0, cell, token).view_as(canvas)
        confidence_NB = torch.zeros_like(canvas, dtype=torch.float32)
        confidence_NB.view(-1).scatter_(0, cell, confidence)
        index_B = entries(canvas)
        masked = (canvas == self.mask_token_id) & (index_B >= step.offset[:, None])
        masked &= index_B < step.width[:, None]
        revealed = reveal(confidence_NB, masked, step.threshold, step.steps_left)
        return torch.where(revealed, token_NB, canvas)

    def _cells(self, step: Step) -> Tensor:
        """[T] flat index into the canvases [N, B] of every row of logits."""
        num_open = step.num_open_np
        run_start = np.cumsum(num_open) - num_open
        entry = np.repeat(step.offset_np - run_start, num_open) + np.arange(num_open.sum())
        # The runner's warm-up offers drafts past the end of a block; a scheduler never does.
        entry = np.minimum(entry, self.block_length - 1)
        cell = np.repeat(np.arange(len(num_open)) * self.block_length, num_open) + entry
        return async_tensor_h2d(cell, device=self.req_states.draft_tokens.device)

    def _empty_output(self, input_batch: InputBatch) -> SamplerOutput:
        """Output of a dummy batch: nothing is sampled."""
        draft_tokens = self.req_states.draft_tokens
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=draft_tokens.device)
        return SamplerOutput(
            sampled_token_ids=draft_tokens[: input_batch.num_reqs],
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=none,
            num_rejected=none,
        )
