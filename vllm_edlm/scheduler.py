"""Scheduling of block diffusion on vLLM's scheduler.

vLLM plans a step by counting: a request runs what it knows beyond its computed tokens, and
its draft tokens. Here the computed tokens of a request, between steps, are those with final
KV, and the drafts are the open positions of its open block. So a query is made of the blocks
completed last (their commit) and of the open block (a denoise step).
"""

from dataclasses import replace
from typing import Any

from vllm_edlm.compat.vllm_api import (
    DraftTokenIds,
    EngineCoreOutputs,
    GrammarOutput,
    LogprobsLists,
    ModelRunnerOutput,
    NewRequestData,
    Request,
    RequestSpecDecodeMetrics,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    SchedulerStats,
    SpecDecodingStats,
)
from vllm_edlm.grammar import CanvasGrammars
from vllm_edlm.metrics import ForwardCounter
from vllm_edlm.open_blocks import OpenBlocks
from vllm_edlm.options import served_options


class BlockDiffusionScheduler(Scheduler):
    """vLLM's scheduler with block accounting. Synchronous: a step's outcome sets the next.

    `AsyncBlockDiffusionScheduler` plans a step before it has the outcome of the last one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = served_options(self.vllm_config.model_config.hf_config)
        self.blocks = OpenBlocks(self.options, self.max_model_len)
        self.grammars = CanvasGrammars(self.structured_output_manager)
        self.forwards = ForwardCounter(self.options.mask_token_id)
        # Lower bound of the tokens that the step being planned may still take.
        self.tokens_left = 0

    def add_request(self, request: Request) -> None:
        """Admit a request; its denoise steps are counted and reported with its last output."""
        self._keep_kv_apart(request)
        super().add_request(request)
        if request.spec_decode_metrics is None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self.num_spec_tokens)

    def _keep_kv_apart(self, request: Request) -> None:
        """KV depends on the block length, so requests share it only with those of their own.

        A request whose blocks do not end where KV pages do shares with none: its pages fill up
        before their last block is final.
        """
        block_length = self.blocks.full_length(request)
        if not self.cache_config.enable_prefix_caching or block_length == self.num_spec_tokens:
            return
        if self.cache_config.block_size % block_length == 0:
            salt = f"diffusion_canvas_length={block_length}"
        else:
            salt = f"request={request.request_id}"
            request.skip_reading_prefix_cache = True
        request.cache_salt = f"{salt},{request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step: every running request offers its open block as draft tokens."""
        self.tokens_left = min(
            self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens
        )
        load = self._load()
        for request in self.running:
            if self.blocks.get(request.request_id) is not None:
                self.blocks.choose_length(request, load)
            request.spec_token_ids = [-1] * (self.blocks.end(request) - request.num_tokens)
        output = super().schedule(throttle_prefills)
        for new_request in output.scheduled_new_reqs:
            request = self.requests[new_request.req_id]
            if (num_open := request.num_computed_tokens - request.num_tokens) > 0:
                output.scheduled_spec_decode_tokens[request.request_id] = [-1] * num_open
            self._tell_of_preemption(new_request)
        self._count_forwards(output)
        return output

    def _tell_of_preemption(self, new_request: NewRequestData) -> None:
        """Read by the model state: a preempted request takes up its block where it was."""
        new_request.open_block = self.blocks.get(new_request.req_id)  # type: ignore[attr-defined]

    def _load(self) -> int:
        return min(len(self.running) + len(self.waiting), self.max_num_running_reqs)

    def _count_forwards(self, output: SchedulerOutput) -> None:
        """Count what a step that has been planned is spent on."""
        self.forwards.begin_step(output.total_num_scheduled_tokens)
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            end = request.num_computed_tokens
            num_open = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            self._count_forward(request, end - num_tokens, end, num_open)

    def _count_forward(self, request: Request, start: int, end: int, num_open: int) -> None:
        self.forwards.add(
            request.request_id,
            start,
            end,
            num_open,
            first_block=self.blocks.last_border(request, request.num_prompt_tokens),
            open_block=self.blocks.last_border(request, end - num_open),
        )

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Cut a query where a block ends (vLLM: the last word on a query's length).

        An open block runs whole or not at all, together with the end of the prompt where the
        step has room for both. Known positions run up to the end of a block; less than a block
        runs only as the end of the prompt of a request to be admitted, which vLLM admits with
        at least one token. A bidirectional prompt runs whole.
        """
        end = num_computed_tokens + num_new_tokens
        if request.status != RequestStatus.RUNNING:
            self.blocks.choose_length(request, self._load())
        if self._reaches_open_block(request, num_computed_tokens, end):
            end = self.blocks.end(request)
        else:
            end = self._cut(request, num_computed_tokens, min(end, request.num_tokens))
        num_new_tokens = max(end - num_computed_tokens, 0)
        # If the request finds no KV pages after all, less is left than there might be.
        self.tokens_left -= num_new_tokens
        return num_new_tokens

    def _reaches_open_block(self, request: Request, start: int, end: int) -> bool:
        """Whether a query from `start`, for which vLLM has tokens up to `end`, can hold the
        whole open block; for a request to be admitted vLLM counts the known tokens alone."""
        open_end = self.blocks.end(request)
        if request.status == RequestStatus.RUNNING:
            return end == open_end > request.num_tokens
        return end == request.num_tokens < open_end <= start + self.tokens_left

    def _cut(self, request: Request, start: int, end: int) -> int:
        """End of a query from `start` over known positions, up to `end` at most."""
        is_prompt_end = end == request.num_tokens
        if is_prompt_end and self.options.token_shift:
            # The last known position predicts the first open one: both run in one step.
            return self.blocks.last_border(request, end - 1)
        border = self.blocks.last_border(request, end)
        admits = request.status != RequestStatus.RUNNING and is_prompt_end
        return end if border <= start and admits else border

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in a step's tokens, and count as computed only what has final KV.

        A block that this step completed was still partly masked while its KV was written: it
        stays uncomputed, and the next step commits it.
        """
        computed = {
            request_id: self._computed_after(request, num_tokens)
            for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items()
            if (request := self.requests.get(request_id)) is not None
        }
        self._take_steps(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, length in computed.items():
            request = self.requests.get(request_id)
            if request is not None and request.status == RequestStatus.RUNNING:
                request.num_computed_tokens = length
        return outputs

    def _computed_after(self, request: Request, num_tokens: int) -> int:
        """What is to be counted as computed after a step of `num_tokens` positions, whose
        tokens the request does not have yet."""
        return self._final_length(request)

    def _final_length(self, request: Request) -> int:
        """Positions with final KV after the request's last planned step, which began with the
        tokens that the request has now."""
        ran_known = min(request.num_computed_tokens, request.num_tokens)
        return self.blocks.last_border(request, ran_known)

    def _take_steps(self, planned: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """Take in the denoise steps, before their tokens are appended."""
        for request_id in planned.scheduled_spec_decode_tokens:
            if (request := self.requests.get(request_id)) is not None:
                index = result.req_id_to_index[request_id]
                self._count_step(request, index, result.logprobs)
                self.grammars.trim(request, result.sampled_token_ids[index])

    def _count_step(self, request: Request, index: int, logprobs: LogprobsLists | None) -> None:
        """Count a denoise step of the request's open block, and keep what it revealed."""
        assert request.sampling_params is not None
        kept = None
        if logprobs is not None and request.sampling_params.num_logprobs is not None:
            rows = slice(index * self.num_spec_tokens, (index + 1) * self.num_spec_tokens)
            kept = LogprobsLists(
                logprobs.logprob_token_ids[rows],
                logprobs.logprobs[rows],
                logprobs.sampled_token_ranks[rows],
            )
        self.blocks.count_step(request, kept)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Grammar masks of the requests that denoise in this step; others have no logits."""
        if not scheduler_output.has_structured_output_requests:
            return None
        drafts = {
            request_id: self._certain_tokens(request_id, len(tokens))
            for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items()
        }
        tokens = scheduler_output.num_scheduled_tokens
        denoising = {key: count for key, count in tokens.items() if key in drafts}
        return super().get_grammar_bitmask(
            replace(
                scheduler_output,
                num_scheduled_tokens=denoising,
                scheduled_spec_decode_tokens=drafts,
            )
        )

    def _certain_tokens(self, request_id: str, num_open: int) -> list[int]:
        """What a grammar makes certain of the open positions; -1 where it does not."""
        request = self.requests.get(request_id)
        tokens = self.grammars.certain_tokens(request, num_open) if request is not None else []
        return tokens + [-1] * (num_open - len(tokens))

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Keep the canvases, which the worker hands back after every step, for preemption."""
        for request_id, canvas in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            self.forwards.reveal(request_id, canvas)
            self.blocks.keep_canvas(request_id, canvas)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self.blocks.remove(request)
        metrics = request.spec_decode_metrics
        num_steps = sum(metrics.histogram) if metrics is not None else 0
        self.forwards.finish(request.request_id, request.num_output_tokens, num_steps)
        return super()._free_request(request, delay_free_blocks)

    def make_stats(
        self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        """The step's statistics, with the counts of forwards and reveals."""
        stats = self.forwards.report(
            spec_decoding_stats, lambda: SpecDecodingStats.new(self.num_spec_tokens)
        )
        return super().make_stats(stats, *args, **kwargs)
