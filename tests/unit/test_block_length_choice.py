"""Block lengths that follow the load: what is chosen, and that its end tells it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.adaptive import (
    SHORTEST,
    affordable_length,
    ladder,
    length_ending_at,
    next_length,
)

full_lengths = st.integers(1, 64)
loads = st.integers(1, 200)
budgets = st.integers(1, 500)


@pytest.mark.parametrize(
    ("full_length", "lengths"),
    [(32, [32, 16, 8, 4]), (12, [12, 6]), (8, [8, 4]), (4, [4]), (7, [7]), (6, [6]), (1, [1])],
)
def test_ladder(full_length: int, lengths: list[int]) -> None:
    assert ladder(full_length) == lengths
    assert lengths == [full_length] or lengths[-1] >= SHORTEST


@pytest.mark.parametrize(
    ("num_requests", "length"), [(1, 32), (2, 16), (3, 8), (4, 8), (5, 4), (8, 4), (100, 4)]
)
def test_affordable_length(num_requests: int, length: int) -> None:
    assert affordable_length(32, 32, num_requests, budget=32) == length


@pytest.mark.parametrize(("max_steps", "length"), [(1, 32), (2, 16), (3, 16), (4, 8), (8, 4)])
def test_a_block_of_one_step_is_not_shortened(max_steps: int, length: int) -> None:
    assert affordable_length(32, max_steps, num_requests=100, budget=32) == length


@given(full_length=full_lengths, num_requests=loads, budget=budgets, data=st.data())
def test_the_budget_is_kept_where_the_ladder_allows(
    full_length: int, num_requests: int, budget: int, data: st.DataObject
) -> None:
    max_steps = data.draw(st.integers(1, full_length))
    length = affordable_length(full_length, max_steps, num_requests, budget)
    shorter = [b for b in ladder(full_length) if b < length]
    assert num_requests * length <= budget or all(b * max_steps < full_length for b in shorter)
    longer = [b for b in ladder(full_length) if b > length]
    assert all(num_requests * b > budget for b in longer)


@given(full_length=full_lengths, prompt_length=st.integers(0, 200), data=st.data())
def test_blocks_tile_the_text_and_their_ends_tell_them(
    full_length: int, prompt_length: int, data: st.DataObject
) -> None:
    limit = prompt_length + data.draw(st.integers(1, 100))
    known, border = prompt_length, None
    while known < limit:
        affordable = data.draw(st.sampled_from(ladder(full_length)))
        length = next_length(full_length, affordable, known, limit, is_first=border is None)
        start, end = known // length * length, min(known // length * length + length, limit)
        assert length in ladder(full_length)
        assert start <= known < end
        assert border is None or start == border == known
        columns = (np.array([x]) for x in (full_length, known, end, limit, border is None))
        assert length_ending_at(*columns)[0] == length
        known = border = end


@given(full_length=full_lengths, prompt_length=st.integers(0, 200))
def test_alone_a_request_has_blocks_of_its_full_length(
    full_length: int, prompt_length: int
) -> None:
    known, is_first = prompt_length, True
    for _ in range(3):
        length = next_length(full_length, full_length, known, 10**6, is_first=is_first)
        assert length == full_length
        known, is_first = known // length * length + length, False
