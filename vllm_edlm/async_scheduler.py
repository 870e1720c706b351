"""Scheduling a step before the outcome of the last one is known.

A step is planned while the last one, and no other, is under way. What the last one revealed is
not known then, but where it leaves its requests is. A request began it with the tokens that
the scheduler has now. If its open block was complete by then, that step commits it, and the next
block comes; else that step denoises it, and the block stays open. So positions, widths and KV
pages of the next step are certain. Only whether it will find masks in the block is not: if it
does, it is a denoise step, else the commit, which the device decides. So a block of d denoise
steps costs d + 1 forwards. Where the last outcome is known, a commit is still fused with the
next denoise step.
"""

from typing import Any

from vllm_edlm.compat.vllm_api import (
    ModelRunnerOutput,
    NewRequestData,
    Request,
    SchedulerOutput,
)
from vllm_edlm.scheduler import BlockDiffusionScheduler


class AsyncBlockDiffusionScheduler(BlockDiffusionScheduler):
    """Block accounting one step ahead of the tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.vllm_config.max_concurrent_batches <= 2, "one step under way, one planned"
        # Requests that have been preempted; some of them run again.
        self.preempted: set[str] = set()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step, from where the one under way leaves its requests."""
        for request in self.running:
            request.num_computed_tokens = self._final_length(request)
        return super().schedule(throttle_prefills)

    def _computed_after(self, request: Request, num_tokens: int) -> int:
        """As long as no further step of the request has been planned, as without async
        scheduling; else `schedule` has seen to it."""
        if request.num_in_flight_tokens > num_tokens:
            return request.num_computed_tokens
        return self._final_length(request)

    def _count_forwards(self, output: SchedulerOutput) -> None:
        """Counted when it is known what they were."""

    def _take_steps(self, planned: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """Count a step's forwards, and as open what was so when the step began: nothing, if it
        turned out to be a commit.

        Requests that finished while it was under way are not counted.
        """
        drafts = planned.scheduled_spec_decode_tokens
        self.forwards.begin_step(planned.total_num_scheduled_tokens)
        for request_id, start in _query_starts(planned).items():
            if (request := self.requests.get(request_id)) is not None:
                end = start + planned.num_scheduled_tokens[request_id]
                num_open = max(end - request.num_tokens, 0)
                drafts[request_id] = [-1] * num_open
                self._count_forward(request, start, end, num_open)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.preempted.add(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self.preempted.discard(request.request_id)
        return super()._free_request(request, delay_free_blocks)

    def _tell_of_preemption(self, new_request: NewRequestData) -> None:
        """Read by the model state, which keeps the canvases of these requests."""
        new_request.preempted = frozenset(self.preempted)  # type: ignore[attr-defined]


def _query_starts(planned: SchedulerOutput) -> dict[str, int]:
    """First position of the query of every request in a step."""
    cached = planned.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return starts | {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
