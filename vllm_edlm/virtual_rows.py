"""Virtual rows: how one query over several blocks becomes non-causal attention rows.

A query holds consecutive positions of one request. Inside a block attention is
bidirectional, between blocks it is causal. Cutting the query at block borders gives rows that
need no mask: the row of block k attends, non-causally, to everything up to the block's end.
The rows of a request share its KV pages. KV is written before attention in every layer, so a
row sees the blocks that stand before it in the same query.

Blocks lie on a grid from `origin`: block k >= 0 holds positions origin + k*B to
origin + (k+1)*B - 1. Positions below `origin` are one block of their own, the bidirectional
prompt; with origin 0 there are none.

Legend for shapes: N requests, R rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class VirtualRows:
    """Rows in query order.

    Attributes:
        request: [R] index of the row's request in the batch.
        query_start: [R + 1] offsets of the rows' queries in the batch's tokens.
        kv_length: [R] positions each row attends to, from position 0.
    """

    request: Ints
    query_start: Ints
    kv_length: Ints


def block_index(positions: Ints, origin: Ints, block_length: int) -> Ints:
    """Block of each position; -1 for positions below `origin`. All [N]."""
    return np.maximum((positions - origin) // block_length, -1)


def block_start(positions: Ints, origin: Ints, block_length: int) -> Ints:
    """First position of the block that holds each position. All [N]."""
    block = block_index(positions, origin, block_length)
    return np.where(block < 0, 0, origin + block * block_length)


def virtual_rows(first: Ints, length: Ints, origin: Ints, block_length: int) -> VirtualRows:
    """Cut queries at block borders.

    Args:
        first: [N] first position of each request's query.
        length: [N] positions in each query, at least 1.
        origin: [N] first position of each request's block grid.
        block_length: B.
    """
    end = first + length
    first_block = block_index(first, origin, block_length)
    rows_per_request = block_index(end - 1, origin, block_length) - first_block + 1
    request = np.repeat(np.arange(len(first)), rows_per_request)
    row_of_request = np.arange(len(request)) - np.repeat(
        np.cumsum(rows_per_request) - rows_per_request, rows_per_request
    )
    block_end = origin[request] + (first_block[request] + row_of_request + 1) * block_length
    kv_length = np.minimum(end[request], block_end)
    query_end = kv_length - first[request] + (np.cumsum(length) - length)[request]
    return VirtualRows(request, np.concatenate(([0], query_end)), kv_length)
