"""The oracle's reveal rules against worked examples."""

import math
from collections.abc import Sequence

import pytest
import torch
from oracle_reveal import RULES, Statistics, choose_reveals


def positions(
    confidence: Sequence[float] = (),
    margin: Sequence[float] = (),
    entropy: Sequence[float] = (),
) -> list[Statistics]:
    """Positions of which a rule may read only the statistic that is given."""
    count = max(map(len, (confidence, margin, entropy)))
    columns = [list(column) or [math.nan] * count for column in (confidence, margin, entropy)]
    return [Statistics(*values) for values in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("confidence", "threshold", "step", "max_steps", "expected"),
    [
        ([0.2, 0.9, 0.8], 0.8, 0, 3, {1, 2}),  # equal to the threshold counts
        ([0.2, 0.5, 0.5], 0.9, 0, 3, {1}),  # none reaches it: the lowest of the most confident
        ([0.2, 0.9, 0.8, 0.8, 0.1], 1.0, 0, 2, {1, 2, 3}),  # ceil(5/2) by the schedule
        ([0.2, 0.3], 1.0, 1, 2, {0, 1}),  # the last step reveals all
        ([0.2, 0.3], 1.0, 5, 2, {0, 1}),  # as does any step behind it
        ([0.95, 0.3, 0.91, 0.92], 0.9, 1, 3, {0, 2, 3}),  # the rule's choice is the larger
    ],
)
def test_reveals_by_hand(
    confidence: list[float], threshold: float, step: int, max_steps: int, expected: set[int]
) -> None:
    _, revealed = choose_reveals("confidence", positions(confidence), threshold, step, max_steps)
    assert revealed == expected


def test_margin_ranks_and_accepts_by_margin() -> None:
    masked = positions(margin=[0.1, 0.8, -0.2, 0.85])
    assert RULES["margin"](masked, 0.8) == ([3, 1, 0, 2], {1, 3})


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.04, {2}), (0.05, {2, 0}), (0.2, {2, 0, 3}), (0.5, {2, 0, 3, 1})],
)
def test_entropy_bounds_the_sum_but_the_largest(threshold: float, expected: set[int]) -> None:
    """In order .05, .125, .2, .3: the sums without the last are 0, .05, .175, .375."""
    masked = positions(entropy=[0.125, 0.3, 0.05, 0.2])
    assert RULES["entropy"](masked, threshold) == ([2, 0, 3, 1], expected)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.45, set()), (0.5, {0}), (0.8, {0, 1}), (1.0, {0, 1})]
)
def test_factor_asks_more_of_each_rank(threshold: float, expected: set[int]) -> None:
    """Rank 1 needs 1 - f/2, rank 2 needs 1 - f/3, rank 3 needs 1 - f/4: more than it has."""
    masked = positions([0.75, 0.74, 0.74, 0.6])
    assert RULES["factor"](masked, threshold) == ([0, 1, 2, 3], expected)


def test_prefix_stops_at_the_first_unsure_position() -> None:
    assert RULES["prefix"](positions([0.9, 0.95, 0.5, 1.0]), 0.9) == ([0, 1, 2, 3], {0, 1})
    order, revealed = choose_reveals("prefix", positions([0.1, 0.9, 0.9]), 0.9, 0, 8)
    assert (order[0], revealed) == (0, {0})


def test_steps_accept_nothing_by_themselves() -> None:
    masked = positions([0.2, 1.0, 1.0])
    assert RULES["steps"](masked, 0.1) == ([1, 2, 0], set())
    assert choose_reveals("steps", masked, 0.1, 0, 2) == ([1, 2, 0], {1, 2})


def test_statistics_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8 and 1/8 for the mask token, which is no rival."""
    logits = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()
    surest = Statistics.of(logits, token=0, mask_token_id=3)
    assert surest.confidence == pytest.approx(0.5)
    assert surest.margin == pytest.approx(0.25)
    assert surest.entropy == pytest.approx(1.75 * math.log(2))
    sampled = Statistics.of(logits, token=2, mask_token_id=0)
    assert (sampled.confidence, sampled.margin) == pytest.approx((0.125, -0.125))


def test_an_impossible_token_adds_no_entropy() -> None:
    certain = Statistics.of(torch.tensor([0.0, -math.inf, -math.inf]), 0, mask_token_id=1)
    assert (certain.confidence, certain.entropy) == (1.0, 0.0)
