"""The order of reveals, from canvases as the scheduler gets them."""

import pytest

from vllm_edlm.evaluate.grid import Cell
from vllm_edlm.evaluate.order import BlockOrder, RevealLog, position_rows

MASK = 99
CELL = Cell("confidence", 0.9, 4, 4)


def log_of(steps: list[tuple[str, int, list[int]]]) -> RevealLog:
    """A log of steps: request, known positions before it, canvas after it; blocks of four."""
    log = RevealLog(MASK)
    for request, known, canvas in steps:
        start = known // 4 * 4
        log.begin_step(request, range(start, start + 4), known)
        log.end_step(request, canvas)
    return log


def revealed(log: RevealLog) -> list[list[int]]:
    return [block.revealed for block in log.take_blocks()]


def test_a_position_is_revealed_once() -> None:
    steps = [
        ("a", 8, [MASK, MASK, 5, MASK]),
        ("a", 8, [3, MASK, 5, MASK]),
        ("a", 9, [3, 7, 5, 6]),
    ]
    assert revealed(log_of(steps)) == [[2, 3, 1, 3]]


def test_what_a_prompt_fills_is_left_out() -> None:
    # What stands in the entries of a prompt has no meaning.
    log = log_of([("a", 6, [1, MASK, MASK, 5]), ("a", 6, [MASK, 0, 4, 5])])
    (block,) = log.take_blocks()
    assert (block.start, block.known, block.revealed) == (4, 2, [2, 1])


def test_requests_take_turns_and_blocks_follow() -> None:
    steps = [
        ("a", 4, [1, MASK, MASK, 2]),
        ("b", 0, [5, 5, 5, 5]),
        ("a", 5, [1, 3, 4, 2]),
        ("b", 4, [MASK, 6, MASK, MASK]),
        ("b", 4, [6, 6, 6, 6]),
    ]
    assert revealed(log_of(steps)) == [[1, 2, 2, 1], [1, 1, 1, 1], [2, 1, 2, 2]]


def test_blocks_that_a_stop_cuts_short_are_left_out() -> None:
    assert revealed(log_of([("a", 0, [1, 2, MASK, MASK])])) == []


def test_canvases_of_others_are_ignored() -> None:
    log = log_of([("a", 0, [1, MASK, 2, MASK])])
    log.end_step("prefilling", [1, 2, 3, 4])
    log.end_step("a", [1, 2, 3, 4])
    assert revealed(log) == []


def test_a_log_begins_anew() -> None:
    log = log_of([("a", 0, [1, 2, 3, 4])])
    assert len(log.take_blocks()) == 1
    assert log.take_blocks() == []


@pytest.mark.parametrize(
    ("steps", "tau"),
    [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0), ([1, 1, 1], None), ([2], None), ([1, 2, 1], 0.0)],
)
def test_direction(steps: list[int], tau: float | None) -> None:
    assert BlockOrder(0, 0, max(steps), steps).left_to_right == (
        None if tau is None else pytest.approx(tau)
    )


def test_figures_of_positions() -> None:
    blocks = [
        BlockOrder(0, 0, 3, [1, 1, 2, 3]),
        BlockOrder(4, 2, 5, [5, 2]),
        BlockOrder(8, 1, 1, [1, 1, 1]),
    ]
    rows = position_rows(CELL, blocks)
    figures = [
        (row["position"], row["blocks"], row["share of steps"], row["in the first step"])
        for row in rows
    ]
    assert figures == [
        (0, 1, 0.0, 1.0),
        (1, 2, 0.0, 1.0),
        (2, 3, 0.75, pytest.approx(1 / 3)),
        (3, 3, 0.625, pytest.approx(1 / 3)),
    ]
    assert rows[0]["threshold"] == 0.9


def test_blocks_of_one_step_have_no_order() -> None:
    (row,) = position_rows(CELL, [BlockOrder(0, 3, 1, [1])])
    assert (row["position"], row["share of steps"], row["in the first step"]) == (3, None, 1.0)
