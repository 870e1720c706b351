"""Scheduling of block diffusion on vLLM's scheduler.

vLLM plans a step by counting: a request runs what it knows beyond its computed tokens, and
its draft tokens. Here the computed tokens of a request, between steps, are those with final
KV, and the drafts are the open positions of its open block. So a query is made of the blocks
completed last (their commit) and of the open block (a denoise step).
"""

from dataclasses import replace
from typing import Any

from vllm_edlm.block_state import OpenBlock
from vllm_edlm.compat.vllm_api import (
    DraftTokenIds,
    EngineCoreOutputs,
    ModelRunnerOutput,
    Request,
    RequestSpecDecodeMetrics,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
)
from vllm_edlm.config import resolve_options


class BlockDiffusionScheduler(Scheduler):
    """vLLM's scheduler with block accounting. Synchronous: a step's outcome sets the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = resolve_options(self.vllm_config)
        self.open_blocks: dict[str, OpenBlock] = {}

    def add_request(self, request: Request) -> None:
        """Admit a request; its denoise steps are counted and reported with its last output."""
        super().add_request(request)
        if request.spec_decode_metrics is None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step: every running request offers its open block as draft tokens."""
        for request in self.running:
            request.spec_token_ids = [-1] * (self._open_end(request) - request.num_tokens)
        output = super().schedule(throttle_prefills)
        for new_request in output.scheduled_new_reqs:
            # Read by the model state: a preempted request takes up its block where it was.
            new_request.open_block = self.open_blocks.get(new_request.req_id)  # type: ignore[attr-defined]
        return output

    def _block_start(self, request: Request) -> int:
        """First position of the request's open block."""
        return self._last_border(request, request.num_tokens)

    def _last_border(self, request: Request, end: int) -> int:
        """Last end of a block at or before position `end`."""
        origin = request.num_prompt_tokens if self.options.bidirectional_prompt else 0
        if end < origin:
            return 0
        return origin + (end - origin) // self.options.block_length * self.options.block_length

    def _open_end(self, request: Request) -> int:
        """End of the open block; the model's length may cut it short."""
        return min(self._block_start(request) + self.options.block_length, self.max_model_len)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Cut a query where a block ends (vLLM: the last word on a query's length).

        An open block runs whole or not at all. Known positions run up to the end of a block;
        less than a block runs only as the end of the prompt of a request to be admitted, which
        vLLM admits with at least one token. A bidirectional prompt runs whole.
        """
        end = num_computed_tokens + num_new_tokens
        if end == self._open_end(request) > request.num_tokens:
            return num_new_tokens
        end = min(end, request.num_tokens)
        cut = self._last_border(request, end)
        if cut > num_computed_tokens:
            return cut - num_computed_tokens
        admits_prompt_end = request.status != RequestStatus.RUNNING and end == request.num_tokens
        return max(end - num_computed_tokens, 0) if admits_prompt_end else 0

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in a step's tokens, and count as computed only what has final KV.

        A block that this step completed was still partly masked while its KV was written: it
        stays uncomputed, and the next step commits it.
        """
        final = {}
        for request_id in scheduler_output.num_scheduled_tokens:
            if (request := self.requests.get(request_id)) is not None:
                ran_known = min(request.num_computed_tokens, request.num_tokens)
                final[request_id] = self._last_border(request, ran_known)
        for request_id in scheduler_output.scheduled_spec_decode_tokens:
            self._count_step(request_id)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, length in final.items():
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.RUNNING:
                request.num_computed_tokens = length
        return outputs

    def _count_step(self, request_id: str) -> None:
        """Count a denoise step of the request's open block."""
        request = self.requests.get(request_id)
        if request is None:
            return
        start = self._block_start(request)
        before = self.open_blocks.get(request_id)
        steps_before = before.steps_done if before is not None and before.start == start else 0
        self.open_blocks[request_id] = OpenBlock(start, steps_before + 1, canvas=())

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Keep the canvases, which the worker hands back after every step, for preemption."""
        for request_id, canvas in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            if (block := self.open_blocks.get(request_id)) is not None:
                self.open_blocks[request_id] = replace(block, canvas=canvas)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self.open_blocks.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks)
