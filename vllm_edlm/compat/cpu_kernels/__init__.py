"""Twins of Model Runner V2's Triton kernels in NumPy and torch, for CPUs without Triton.

The index kernels prepare a step and book its tokens; the sampler's turn logits into tokens and
log-probabilities. Kernels of what this plugin does not use have none (speculative decoding, bad
words, prompt log-probabilities).
"""

import functools
from collections.abc import Callable
from typing import Any

from . import block_table, gumbel, input_batch, logits, logprobs, penalties

_RUNNER = "vllm.v1.worker.gpu"
_SAMPLER = f"{_RUNNER}.sample"
TWINS: dict[str, Callable[..., None]] = {
    f"{_RUNNER}.input_batch._prepare_prefill_inputs_kernel": input_batch.prepare_prefill_inputs,
    f"{_RUNNER}.input_batch._prepare_pos_seq_lens_kernel": input_batch.prepare_pos_seq_lens,
    f"{_RUNNER}.input_batch._combine_sampled_and_draft_tokens_kernel": (
        input_batch.combine_sampled_and_draft_tokens
    ),
    f"{_RUNNER}.input_batch._get_num_sampled_and_rejected_kernel": (
        input_batch.get_num_sampled_and_rejected
    ),
    f"{_RUNNER}.input_batch._post_update_kernel": input_batch.post_update,
    f"{_RUNNER}.input_batch._post_update_num_computed_tokens_kernel": (
        input_batch.post_update_num_computed_tokens
    ),
    f"{_RUNNER}.input_batch._expand_idx_mapping_kernel": input_batch.expand_idx_mapping,
    f"{_RUNNER}.block_table._compute_slot_mappings_kernel": block_table.compute_slot_mappings,
    f"{_RUNNER}.buffer_utils._apply_write_kernel": block_table.apply_write,
    f"{_RUNNER}.structured_outputs._apply_grammar_bitmask_kernel": logits.apply_grammar_bitmask,
    f"{_SAMPLER}.gumbel._temperature_kernel": logits.temperature,
    f"{_SAMPLER}.gumbel._gumbel_sample_kernel": gumbel.gumbel_sample,
    f"{_SAMPLER}.min_p._min_p_kernel": logits.min_p,
    f"{_SAMPLER}.logit_bias._bias_kernel": logits.bias,
    f"{_SAMPLER}.penalties._penalties_kernel": penalties.penalties,
    f"{_SAMPLER}.penalties._bincount_kernel": penalties.bincount,
    f"{_SAMPLER}.logprob._topk_log_softmax_kernel": logprobs.topk_log_softmax,
    f"{_SAMPLER}.logprob._ranks_kernel": logprobs.ranks,
    f"{_SAMPLER}.logprob._fill_logprob_token_ids_kernel": logprobs.fill_logprob_token_ids,
}
"""Qualified kernel name -> twin, as vLLM's kernel registry wants them."""


class GridKernel:
    """A kernel whose twin also needs the launch grid, which vLLM's registry drops."""

    def __init__(self, twin: Callable[..., None]) -> None:
        self._twin = twin

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._twin, grid)


@functools.cache
def install() -> bool:
    """Make the kernels of Model Runner V2 and its sampler run on this CPU.

    Swaps the kernels for the whole process, once; later calls change nothing. It imports the
    runner's modules, so call it in the process that runs the model, after
    `vllm.v1.worker.cpu.shm`, which must be first to patch `torch` there.

    Returns:
        True if the twins are in place; False where Triton is usable or the platform is not CPU,
        and then nothing has been touched.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or not current_platform.is_cpu():
        return False

    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.worker.gpu import block_table as vllm_block_table

    register_kernels(TWINS)
    gather: Any = GridKernel(block_table.gather_block_tables)
    vllm_block_table._gather_block_tables_kernel = gather
    _complete_triton_placeholder()
    return True


def _complete_triton_placeholder() -> None:
    """Give vLLM's stand-in for `triton` the host function that kernel launches call."""
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2
