"""Virtual rows give every query position exactly the keys that the block mask gives it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.virtual_rows import block_start, virtual_rows

Query = tuple[int, int, int]
queries = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 40)), min_size=1
)


def visible_until(position: int, end: int, origin: int, block_length: int) -> int:
    """First position that `position` does not see, of a sequence that ends at `end`."""
    if position < origin:
        return min(origin, end)
    return min(origin + ((position - origin) // block_length + 1) * block_length, end)


def columns(batch: list[Query]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, length, origin = np.array(batch, dtype=np.int64).T
    return first, length, origin


@given(batch=queries, block_length=st.integers(1, 17))
def test_rows_are_the_block_mask(batch: list[Query], block_length: int) -> None:
    rows = virtual_rows(*columns(batch), block_length)
    seen = []
    for row, request in enumerate(rows.request):
        query_length = rows.query_start[row + 1] - rows.query_start[row]
        assert query_length >= 1
        last = rows.kv_length[row]
        seen += [(request, last - query_length + i, last) for i in range(query_length)]
    wanted = [
        (request, position, visible_until(position, first + length, origin, block_length))
        for request, (first, length, origin) in enumerate(batch)
        for position in range(first, first + length)
    ]
    assert seen == wanted


@given(batch=queries, block_length=st.integers(1, 17))
def test_block_start(batch: list[Query], block_length: int) -> None:
    position, _, origin = columns(batch)
    for start, p, o in zip(
        block_start(position, origin, block_length), position, origin, strict=True
    ):
        assert start == (0 if p < o else max(s for s in range(o, p + 1, block_length)))
