"""Virtual rows give every query position exactly the keys that the block mask gives it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.virtual_rows import VirtualRows, block_end, block_start, virtual_rows

Query = tuple[int, int, int, int]
positions = st.integers(0, 40)
queries = st.lists(
    st.tuples(positions, st.integers(1, 40), positions, st.integers(1, 17)), min_size=1
)


def visible_until(position: int, end: int, origin: int, block_length: int) -> int:
    """First position that `position` does not see, of a sequence that ends at `end`."""
    if position < origin:
        return min(origin, end)
    return min(origin + ((position - origin) // block_length + 1) * block_length, end)


def columns(batch: list[Query]) -> np.ndarray:
    """First position, length, origin and block length of each request, [4, N]."""
    return np.array(batch, dtype=np.int64).T


def keys_seen(rows: VirtualRows) -> list[tuple[int, int, int]]:
    """(request, position, first position it does not see) of every query position."""
    seen = []
    for row, request in enumerate(rows.request):
        query_length = rows.query_start[row + 1] - rows.query_start[row]
        assert query_length >= 1
        last = rows.kv_length[row]
        seen += [(request, last - query_length + i, last) for i in range(query_length)]
    return seen


@given(batch=queries)
def test_rows_without_an_open_block_are_the_block_mask(batch: list[Query]) -> None:
    first, length, _, _ = columns(batch)
    assert keys_seen(virtual_rows(*columns(batch), open_start=first + length)) == [
        (request, position, visible_until(position, first + length, origin, block_length))
        for request, (first, length, origin, block_length) in enumerate(batch)
        for position in range(first, first + length)
    ]


@given(batch=queries, causal_past=st.booleans(), data=st.data())
def test_the_open_block_sees_itself_whole_and_is_not_seen(
    batch: list[Query], causal_past: bool, data: st.DataObject
) -> None:
    starts = [data.draw(st.integers(first, first + length)) for first, length, _, _ in batch]
    rows = virtual_rows(*columns(batch), open_start=np.array(starts), causal_past=causal_past)
    for request, position, end in keys_seen(rows):
        first, length, origin, block_length = batch[request]
        if position >= starts[request]:
            assert end == first + length
        elif causal_past:
            assert end == position + 1
        else:
            assert end == visible_until(position, starts[request], origin, block_length)


@given(batch=queries)
def test_block_borders(batch: list[Query]) -> None:
    position, _, origin, block_length = columns(batch)
    starts = block_start(position, origin, block_length)
    ends = block_end(position, origin, block_length)
    for start, end, p, o, b in zip(starts, ends, position, origin, block_length, strict=True):
        assert start == (0 if p < o else max(s for s in range(o, p + 1, b)))
        assert end == (o if p < o else start + b)
