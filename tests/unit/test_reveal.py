"""Reveal rules against the sentences of the semantics, position by position."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.reveal import most_confident, reveal

# Few distinct values, so that ties are common.
confidences = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
positions = st.lists(st.tuples(confidences, st.booleans()), min_size=8, max_size=8)


def expected(row: list[tuple[float, bool]], threshold: float, steps_left: int) -> list[bool]:
    masked = [i for i, (_, is_masked) in enumerate(row) if is_masked]
    by_confidence = sorted(masked, key=lambda i: (-row[i][0], i))
    enough = by_confidence[: math.ceil(len(masked) / steps_left)]
    return [m and (c >= threshold or i in enough) for i, (c, m) in enumerate(row)]


@given(
    rows=st.lists(positions, min_size=1, max_size=4),
    threshold=confidences.filter(bool),
    steps_left=st.integers(1, 9),
)
def test_reveal(rows: list[list[tuple[float, bool]]], threshold: float, steps_left: int) -> None:
    confidence = torch.tensor([[c for c, _ in row] for row in rows])
    masked = torch.tensor([[m for _, m in row] for row in rows])
    count = len(rows)
    got = reveal(
        confidence, masked, torch.full((count,), threshold), torch.full((count,), steps_left)
    )
    assert got.tolist() == [expected(row, threshold, steps_left) for row in rows]
    assert (got.any(dim=1) == masked.any(dim=1)).all(), "every step makes progress"


def test_most_confident_takes_the_lower_position_on_ties() -> None:
    confidence = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    masked = torch.tensor([[False, True, True, True]])
    assert most_confident(confidence, masked, torch.tensor([2])).tolist() == [
        [False, True, True, False]
    ]
