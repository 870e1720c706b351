"""What a pipeline's last stage sampled, for the other stages' next step.

vLLM's stages overlap: a request runs again as many steps later as there are stages, and so does
a stage keep what it receives. Here a request runs again in the very next step. Upstream shape:
patches/0009.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu.pp_utils import PPHandler

from vllm_edlm.compat.replacement import replace_method


def take_outcomes_at_once() -> None:
    """Let stages before the last take the outcome of one step in the next, once.

    The worker of a stage serves one model, so no other model's stages are meant.
    """
    replace_method(PPHandler, "get_prev_sampled_outputs", _of_the_last_step)


def _of_the_last_step(
    original: Callable[..., Any], handler: PPHandler, *args: Any, **kwargs: Any
) -> Any:
    """Before the first step the queue holds an empty place for each stage; one is enough."""
    while len(handler.queue) > 1:
        handler.queue.popleft()
    return original(handler, *args, **kwargs)
