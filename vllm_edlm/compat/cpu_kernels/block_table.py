"""Twins of the Triton kernels in vLLM's `block_table.py` and `buffer_utils.py` (v1/worker/gpu).

Legend for shapes: G = KV cache groups, R = requests in the batch, S = request slots
(`max_num_reqs`), T = tokens in the batch, N = writes. Tables of several groups come as [G]
uint64 data pointers of int32 tables and their [G] row strides (entries a row). Every twin
writes in place, and only what its kernel writes.
"""

import numpy as np
import torch

from .arrays import int32_at, ragged, spans


def gather_block_tables(
    grid: tuple[int, int],
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks: torch.Tensor,
    _num_blocks_stride: int,
    num_reqs: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_gather_block_tables_kernel`: block-table rows in batch order.

    For each group, row b of the destination gets the first `num_blocks[g, slot]` ([G, S], kv
    pages) entries of row slot = `batch_idx_to_req_idx[b]` ([R]) of the source; entries beyond
    are left as they are. Rows from `num_reqs` up to the padded row count are zeroed; that count
    is an argument of the launch only: `grid` is (G, padded rows).
    """
    slots, strides = batch_idx_to_req_idx.numpy()[:num_reqs], block_table_strides.tolist()
    sources, targets = src_block_table_ptrs.tolist(), dst_block_table_ptrs.tolist()
    for group, pages in enumerate(num_blocks.numpy()[: grid[0]]):
        source = int32_at(sources[group], (len(pages), strides[group]))
        target = int32_at(targets[group], (grid[1], strides[group]))
        target[num_reqs:] = 0
        held = pages[slots]
        width = int(held.max(initial=0))
        filled = np.arange(width) < held[:, None]
        np.copyto(target[:num_reqs, :width], source[slots, :width], where=filled)


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    _dcp_sharded: torch.Tensor,
    slot_mappings: torch.Tensor,
    _slot_mappings_stride: int,
    _cp_rank: int,
    **constexprs: int,
) -> None:
    """Twin of `_compute_slot_mappings_kernel`: the KV slot that each token's key goes to.

    Writes `slot_mappings` [G, max_num_tokens] whole: page number * page size + place in the
    page; PAD_ID for tokens of rows with a negative `idx_mapping` [R], for groups that are not
    enabled ([G] bool), and after the last token. Reads `query_start_loc` [R + 1], `pos` [T],
    `block_sizes` [G] (kv page sizes, tokens).

    Raises:
        NotImplementedError: for context parallelism (CP_SIZE above 1).
    """
    if constexprs["CP_SIZE"] != 1:
        raise NotImplementedError(
            "context parallelism is not supported on CPU without Triton: "
            f"set decode_context_parallel_size to 1 (it is {constexprs['CP_SIZE']})"
        )
    batch_slots = idx_mapping.numpy()
    starts, lengths = spans(query_start_loc, len(batch_slots))
    row, offset = ragged(lengths)
    token, slot = starts[row] + offset, batch_slots[row]
    real = slot >= 0
    token_real, slot_real, pos_real = token[real], slot[real], pos.numpy()[token[real]]
    num_rows = int(slot_real.max(initial=-1)) + 1
    addresses, strides = block_table_ptrs.tolist(), block_table_strides.tolist()
    enabled, page_sizes = slot_mapping_enabled.tolist(), block_sizes.tolist()
    for group, mapping in enumerate(slot_mappings.numpy()[: len(addresses)]):
        mapping[token] = constexprs["PAD_ID"]
        mapping[query_start_loc[len(batch_slots)] : max_num_tokens] = constexprs["PAD_ID"]
        if enabled[group]:
            table = int32_at(addresses[group], (num_rows, strides[group]))
            page, place = np.divmod(pos_real, page_sizes[group])
            # int64 before the product, which the kernel takes in int32: large caches overflow it.
            pages = table[slot_real, page].astype(np.int64)
            mapping[token_real] = pages * page_sizes[group] + place


def apply_write(
    output: torch.Tensor,
    output_stride: int | torch.Tensor,
    write_indices: torch.Tensor,
    write_starts: torch.Tensor,
    write_contents: torch.Tensor,
    write_cu_lens: torch.Tensor,
    write_group_ids: torch.Tensor | None,
    **constexprs: int,
) -> None:
    """Twin of `_apply_write_kernel`: scatter staged row writes into their tensor(s).

    Write n puts `write_contents[cu_lens[n - 1] : cu_lens[n]]` into row `write_indices[n]` from
    column `write_starts[n]` on (all [N] but the flat contents). Without MULTI_GROUP `output` is
    the tensor itself, 1-D or 2-D with `output_stride` entries a row; with it, `output` and
    `output_stride` are [G] pointers and strides, and `write_group_ids` [N] chooses. Of two
    writes to one entry the later wins; the kernel leaves that open.
    """
    cu_lens = write_cu_lens.numpy()
    row, offset = ragged(np.diff(cu_lens, prepend=0))
    column = write_starts.numpy()[row] + offset
    # int64 before the product with the stride: the entries of a large table do not fit int32.
    index = write_indices.numpy()[row].astype(np.int64)
    contents = write_contents.numpy()[: len(row)]
    if not constexprs["MULTI_GROUP"]:
        output.view(-1).numpy()[index * output_stride + column] = contents
        return
    assert write_group_ids is not None
    assert isinstance(output_stride, torch.Tensor)
    group_of, addresses = write_group_ids.numpy()[row], output.tolist()
    for group, stride in enumerate(output_stride.tolist()):
        mine = group_of == group
        place = index[mine] * stride + column[mine]
        int32_at(addresses[group], (int(place.max(initial=-1)) + 1,))[place] = contents[mine]
