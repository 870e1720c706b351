"""Virtual rows: how one query over several blocks becomes non-causal attention rows.

A query holds consecutive positions of one request. Inside a block attention is
bidirectional, between blocks it is causal. Cutting the query at block borders gives rows that
need no mask: the row of block k attends, non-causally, to everything up to the block's end.
The rows of a request share its KV pages. KV is written before attention in every layer, so a
row sees the blocks that stand before it in the same query.

Blocks lie on a grid from `origin`: block k >= 0 holds positions origin + k*B to
origin + (k+1)*B - 1. Positions below `origin` are one block of their own, the bidirectional
prompt; with origin 0 there are none.

Legend for shapes: N requests, T positions of all queries, R rows.
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


def block_start(positions: Ints, origin: Ints, block_length: Ints) -> Ints:
    """First position of the block that holds each position. All [N]."""
    start = origin + (positions - origin) // block_length * block_length
    return np.where(positions < origin, 0, start)


def block_end(positions: Ints, origin: Ints, block_length: Ints) -> Ints:
    """First position behind the block that holds each position. All [N]."""
    end = origin + ((positions - origin) // block_length + 1) * block_length
    return np.where(positions < origin, origin, end)


def virtual_rows(
    first: Ints,
    length: Ints,
    origin: Ints,
    block_length: Ints,
    open_start: Ints,
    causal_past: bool = False,
) -> VirtualRows:
    """Cut queries at block borders.

    Args:
        first: [N] first position of each request's query.
        length: [N] positions in each query, at least 1.
        origin: [N] first position of each request's block grid.
        block_length: [N] B of each request; its open block, and the one before it, may be
            shorter.
        open_start: [N] start of the open block, the end of the query where there is none.
        causal_past: positions before the open block attend token-causally, in rows of one
            position each.
    """
    request_T = np.repeat(np.arange(len(first)), length)
    query_start = np.cumsum(length) - length
    position_T = np.arange(len(request_T)) - query_start[request_T] + first[request_T]
    past_kv_length_T = (
        position_T + 1
        if causal_past
        else block_end(position_T, origin[request_T], block_length[request_T])
    )
    open_start_T, end_T = open_start[request_T], (first + length)[request_T]
    kv_length_T = np.where(
        position_T < open_start_T, np.minimum(past_kv_length_T, open_start_T), end_T
    )
    is_border = (np.diff(request_T) != 0) | (np.diff(kv_length_T) != 0)
    row_start = np.concatenate(([0], np.flatnonzero(is_border) + 1))
    return VirtualRows(
        request_T[row_start],
        np.concatenate((row_start, [len(request_T)])),
        kv_length_T[row_start],
    )
