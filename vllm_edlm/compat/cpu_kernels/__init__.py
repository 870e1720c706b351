"""NumPy twins of Model Runner V2's Triton index kernels, for CPUs without a Triton backend."""

import functools
from collections.abc import Callable
from typing import Any

from . import block_table, input_batch

_RUNNER = "vllm.v1.worker.gpu"
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
    """Make Model Runner V2's index kernels run on this CPU.

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
