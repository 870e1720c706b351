"""The canvas: choice of tokens, emission of the known run, and what is masked again."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.canvas import (
    emitted_run,
    entropy,
    margin,
    open_canvas,
    open_entries,
    place,
)

MASK = 9


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.tensor([[0.0, 1.0, 1.0, 5.0], [2.0, 0.0, 0.0, 0.0]])


def test_margin_leaves_the_mask_out(logits: torch.Tensor) -> None:
    probability = logits.softmax(dim=1)
    wanted = torch.stack(
        [probability[0, 1] - probability[0, 2], probability[1, 0] - probability[1, 1]]
    )
    assert torch.allclose(margin(logits, torch.tensor([1, 0]), mask_token_id=3), wanted)


def test_entropy_counts_the_mask(logits: torch.Tensor) -> None:
    probability = logits.softmax(dim=1)
    assert torch.allclose(entropy(logits), -(probability * probability.log()).sum(dim=1))


def test_measures_where_tokens_are_banned() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0], [-math.inf, -math.inf, -math.inf]])
    token = torch.tensor([1, 0])
    assert margin(logits, token, mask_token_id=0).tolist() == [0.0, 0.0]
    assert torch.allclose(entropy(logits), torch.tensor([math.log(2), 0.0]))


def test_place_and_open_entries() -> None:
    canvas = torch.tensor([[7, 7, 7], [7, 7, 7]])
    placed = place(torch.tensor([1, 5]), torch.tensor([0.5, 0.25]), canvas)
    assert placed.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.0, 0.25]]
    is_open = open_entries(canvas, torch.tensor([1, 0]), torch.tensor([3, 2]))
    assert is_open.tolist() == [[False, True, True], [True, True, False]]


entry = st.sampled_from([1, 2, MASK])
rows = st.tuples(
    st.lists(entry, min_size=6, max_size=6), st.integers(0, 6), st.integers(0, 6), st.booleans()
)


@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_emitted_run(batch: list[tuple[list[int], int, int, bool]]) -> None:
    canvas = torch.tensor([row[0] for row in batch])
    offset = torch.tensor([min(row[1], row[2]) for row in batch])
    width = torch.tensor([max(row[1], row[2]) for row in batch])
    tokens, count = emitted_run(canvas, offset, width, MASK)
    for i, (row, start, end) in enumerate(
        zip(canvas.tolist(), offset.tolist(), width.tolist(), strict=True)
    ):
        run = row[start:end]
        run = run[: run.index(MASK)] if MASK in run else run
        assert tokens[i, : count[i]].tolist() == run


@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_open_canvas(batch: list[tuple[list[int], int, int, bool]]) -> None:
    canvas = torch.tensor([row[0] for row in batch])
    offset = torch.tensor([row[1] for row in batch])
    is_new = torch.tensor([row[3] for row in batch])
    opened = open_canvas(canvas, offset, is_new, MASK).tolist()
    for before, after, start, new in zip(
        canvas.tolist(), opened, offset.tolist(), is_new.tolist(), strict=True
    ):
        # An emitted run that was not accepted starts at `start` and ends at the first mask.
        end = before.index(MASK, start) if MASK in before[start:] else len(before)
        kept = [MASK if start <= i < end else token for i, token in enumerate(before)]
        assert after[start:] == ([MASK] * len(after) if new else kept)[start:]
