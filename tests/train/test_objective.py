"""Which objectives there are, and what of them cannot be combined."""

from __future__ import annotations

from typing import Any

import pytest

from tests.train.joint_examples import objective
from vllm_edlm.train.masks import Pattern


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"noise_copies": 0}, "noise_copies must be at least 1, got 0"),
        ({"half_life_ratio": 0.0}, "half_life_ratio must be above 0, got 0.0"),
        ({"half_life_ratio": float("nan")}, "half_life_ratio must be above 0, got nan"),
        ({"noise": "pink"}, "noise must be one of position, uniform, got 'pink'"),
        ({"ar_loss_weight": -1.0}, "ar_loss_weight must be a finite number"),
        ({"ar_loss_weight": float("inf")}, "ar_loss_weight must be a finite number"),
        ({"distillation_weight": 1.5}, "distillation_weight must be from 0 to 1, got 1.5"),
        ({"growth": (2, 3, 4)}, r"divide the block length and end with it \(4\), got 2,3,4"),
        ({"growth": (4, 2)}, "growth must name rising block lengths"),
        ({"growth": (2, 2, 4)}, "growth must name rising block lengths"),
        ({"growth": (1, 2)}, "growth must name rising block lengths"),
        ({"growth": (0, 4)}, "growth must name rising block lengths"),
    ],
)
def test_what_is_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**changes)


@pytest.mark.parametrize("pattern", [Pattern.block_noisy, Pattern.bidirectional])
def test_without_a_clean_half_there_is_no_next_token_loss_and_no_teacher(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match=f"ar_loss_weight must be 0 with pattern {pattern}"):
        objective(pattern=pattern, ar_loss_weight=0.5)
    with pytest.raises(ValueError, match="distillation_weight must be 0 with token_shift or a"):
        objective(pattern=pattern, distillation_weight=0.5)


def test_a_teacher_knows_no_token_shift() -> None:
    with pytest.raises(ValueError, match="distillation_weight must be 0 with token_shift"):
        objective(token_shift=True, distillation_weight=0.5)


def test_block_lengths_grow_in_equal_shares_of_the_steps() -> None:
    grows = objective(growth=(1, 2, 4))
    assert [grows.block_length_at(step, 6) for step in range(6)] == [1, 1, 2, 2, 4, 4]
    assert [grows.block_length_at(step, 7) for step in range(7)] == [1, 1, 1, 2, 2, 4, 4]
    assert [objective().block_length_at(step, 2) for step in range(3)] == [4, 4, 4]
