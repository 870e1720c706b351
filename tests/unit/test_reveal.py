"""Reveal rules against the sentences of the semantics, position by position."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.reveal import RULES, Measures, rank_positions, reveal, reveal_one

# Few distinct values, so that ties are common; exact in binary, so that sums are.
values = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0])
Position = tuple[float, float, float, bool]
positions = st.lists(st.tuples(values, values, values, st.booleans()), min_size=8, max_size=8)
Accept = Callable[[Sequence[float], float], list[int]]
"""(measure of the masked positions in the rule's order, threshold) -> accepted indices."""


def all_above(measure: Sequence[float], threshold: float) -> list[int]:
    return [i for i, value in enumerate(measure) if value >= threshold]


def while_sure_together(measure: Sequence[float], threshold: float) -> list[int]:
    count = 0
    while count < len(measure) and measure[count] >= 1 - threshold / (count + 2):
        count += 1
    return list(range(count))


def within_bound(entropy: Sequence[float], threshold: float) -> list[int]:
    fits = [k for k in range(1, len(entropy) + 1) if sum(entropy[: k - 1]) <= threshold]
    return list(range(max(fits, default=0)))


def leftmost_run(measure: Sequence[float], threshold: float) -> list[int]:
    count = 0
    while count < len(measure) and measure[count] >= threshold:
        count += 1
    return list(range(count))


MEANING: dict[str, tuple[Callable[[Position], float], Callable[[Position], float], Accept]] = {
    "confidence": (lambda p: -p[0], lambda p: p[0], all_above),
    "margin": (lambda p: -p[1], lambda p: p[1], all_above),
    "entropy": (lambda p: p[2], lambda p: p[2], within_bound),
    "factor": (lambda p: -p[0], lambda p: p[0], while_sure_together),
    "prefix": (lambda p: 0.0, lambda p: p[0], leftmost_run),
    "steps": (lambda p: -p[0], lambda p: p[0], lambda measure, threshold: []),
}
"""Of each rule: sort key of its order, measure, and which of the ordered it accepts."""


def expected(name: str, row: list[Position], threshold: float, steps_left: int) -> list[bool]:
    key, measure, accept = MEANING[name]
    masked = [i for i, position in enumerate(row) if position[3]]
    order = sorted(masked, key=lambda i: (key(row[i]), i))
    enough = order[: math.ceil(len(masked) / steps_left)]
    accepted = [order[i] for i in accept([measure(row[i]) for i in order], threshold)]
    return [i in accepted or i in enough for i in range(len(row))]


def columns(rows: list[list[Position]]) -> tuple[Measures, torch.Tensor]:
    confidence, margin, entropy, masked = torch.tensor(rows).unbind(dim=2)
    return Measures(confidence, margin, entropy), masked.bool()


def test_every_rule_has_a_meaning_here() -> None:
    assert set(MEANING) == set(RULES)


@given(
    rows=st.lists(
        st.tuples(positions, st.sampled_from(list(RULES)), values.filter(bool), st.integers(1, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_rules_side_by_side(rows: list[tuple[list[Position], str, float, int]]) -> None:
    measures, masked = columns([row[0] for row in rows])
    index = [list(RULES).index(row[1]) for row in rows]
    threshold = torch.tensor([row[2] for row in rows])
    ranked = rank_positions(measures, masked, threshold, torch.tensor(index), sorted(set(index)))
    got = reveal(ranked, masked, torch.tensor([row[3] for row in rows]))
    assert got.tolist() == [expected(name, row, t, left) for row, name, t, left in rows]
    assert (got.any(dim=1) == masked.any(dim=1)).all(), "every step makes progress"
    one = reveal_one(ranked, masked)
    assert (one.sum(dim=1) == masked.any(dim=1)).all()
    assert (one <= got).all(), "the first in rank is always revealed"


@pytest.mark.parametrize("index", range(len(RULES)))
def test_forced_positions_are_revealed_beside_the_rules_choice(index: int) -> None:
    row = [(1.0, 1.0, 0.0, True), (0.0, 0.0, 1.0, True), (0.0, 0.0, 1.0, True)]
    measures, masked = columns([row, row])
    forced = torch.tensor([[False, True, False], [False, False, False]])
    rule = torch.tensor([index, index])
    ranked = rank_positions(measures, masked, torch.ones(2), rule, [index], forced)
    got = reveal(ranked, masked, torch.tensor([9, 9]))
    assert got[0, 0], "the rule's own choice"
    assert got[0, 1], "the forced position"
    one = reveal_one(ranked, masked, forced)
    assert one.tolist() == [[False, True, False], [True, False, False]]
