"""Where the blocks of the scheduler's requests lie, and what the open ones have had."""

from dataclasses import replace

from vllm_edlm.adaptive import affordable_length, next_length
from vllm_edlm.block_state import OpenBlock
from vllm_edlm.compat.vllm_api import LogprobsLists, Request
from vllm_edlm.options import Options, block_length_of, max_steps_of


class OpenBlocks:
    """The blocks of every request in the scheduler.

    Blocks of a request's full length lie on one grid. Where block lengths follow the load, its
    open block, and those it has had, may be shorter ones between the grid's borders.
    """

    def __init__(self, options: Options, max_model_len: int) -> None:
        self.options = options
        self.max_model_len = max_model_len
        self._begun: dict[str, OpenBlock] = {}
        # Of the open block; a request that has none here has blocks of its full length.
        self._lengths: dict[str, int] = {}

    def get(self, request_id: str) -> OpenBlock | None:
        """The block that a request's last denoise step was for."""
        return self._begun.get(request_id)

    def origin(self, request: Request) -> int:
        """Where the request's grid begins."""
        return request.num_prompt_tokens if self.options.blocks_follow_prompt else 0

    def full_length(self, request: Request) -> int:
        """Length of the request's blocks, whatever the load."""
        assert request.sampling_params is not None
        return block_length_of(request.sampling_params.extra_args, self.options)

    def length(self, request: Request) -> int:
        """Length of the request's open block."""
        return self._lengths.get(request.request_id) or self.full_length(request)

    def start(self, request: Request) -> int:
        """First position of the request's open block."""
        origin, length = self.origin(request), self.length(request)
        return origin + (request.num_tokens - origin) // length * length

    def end(self, request: Request) -> int:
        """End of the open block; the model's length may cut it short."""
        return min(self.start(request) + self.length(request), self.max_model_len)

    def last_border(self, request: Request, end: int) -> int:
        """Last position at or before `end` where a query may be cut."""
        origin = self.origin(request)
        if end < origin:
            return end if self.options.has_causal_past else 0
        if end >= (start := self.start(request)):
            return start
        full_length = self.full_length(request)
        return origin + (end - origin) // full_length * full_length

    def choose_length(self, request: Request, load: int) -> None:
        """Choose the open block's length by the load, if it has had no denoise step.

        Args:
            load: requests that are running, or want to.
        """
        budget = self.options.adaptive_canvas
        if budget is None or self.steps(request) > 0:
            return
        full_length, origin = self.full_length(request), self.origin(request)
        assert request.sampling_params is not None
        max_steps = max_steps_of(request.sampling_params.extra_args, self.options)
        self._lengths[request.request_id] = next_length(
            full_length,
            affordable_length(full_length, max_steps, load, budget),
            request.num_tokens - origin,
            self.max_model_len - origin,
            is_first=request.request_id not in self._begun,
        )

    def steps(self, request: Request) -> int:
        """Denoise steps that the request's open block has had."""
        block = self.get(request.request_id)
        is_open = block is not None and request.num_tokens < block.start + block.length
        return block.steps_done if block is not None and is_open else 0

    def count_step(self, request: Request, logprobs: LogprobsLists | None) -> None:
        """Count a denoise step, before its tokens are appended to the request.

        Args:
            logprobs: of the block's positions, if the request wants them.
        """
        self._begun[request.request_id] = OpenBlock(
            self.start(request), self.length(request), self.steps(request) + 1, (), logprobs
        )

    def keep_canvas(self, request_id: str, canvas: list[int]) -> None:
        """Keep a canvas as the last step has left it."""
        if (block := self._begun.get(request_id)) is not None:
            self._begun[request_id] = replace(block, canvas=canvas)

    def remove(self, request: Request) -> None:
        """Forget a finished request."""
        self._begun.pop(request.request_id, None)
        self._lengths.pop(request.request_id, None)
