"""Decoding options that an evaluation goes through."""

import pytest

from vllm_edlm.evaluate.grid import Cell, columns_of, grid
from vllm_edlm.options import Options

SERVED = Options(16, 16, "confidence", 0.9, 2, "block_causal")


def test_every_combination_once() -> None:
    cells = grid(SERVED, ["confidence", "margin"], [0.5, 0.9], [8, 16], [4])
    assert len(cells) == len(set(cells)) == 8
    assert Cell("margin", 0.5, 8, 4) in cells


def test_defaults_are_the_rules_own_and_the_served_ones() -> None:
    cells = grid(SERVED, ["confidence", "entropy", "steps"])
    assert cells == [
        Cell("confidence", 0.9, 16, 16),
        Cell("entropy", 0.1, 16, 16),
        Cell("steps", None, 16, 16),
    ]


def test_the_rule_without_a_threshold_stands_once_for_all_thresholds() -> None:
    cells = grid(SERVED, ["steps"], [0.5, 0.9], [], [2, 4])
    assert cells == [Cell("steps", None, 16, 2), Cell("steps", None, 16, 4)]
    assert "diffusion_threshold" not in cells[0].extra_args


def test_a_short_block_takes_no_more_steps_than_it_has_positions() -> None:
    assert grid(SERVED, ["confidence"], [], [4], [8, 16]) == [Cell("confidence", 0.9, 4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ["best"]}, "diffusion_reveal must be one of .*, got 'best'"),
        ({"thresholds": [1.5]}, r"diffusion_threshold must be a number in \(0, 1\], got 1.5"),
        ({"thresholds": [0.0]}, r"diffusion_threshold .* got 0.0"),
        ({"block_lengths": [32]}, "diffusion_canvas_length must be .* from 1 to 16, got 32"),
        ({"max_steps": [17]}, "diffusion_max_steps must be .* from 1 to 16, got 17"),
    ],
)
def test_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(SERVED, **({"rules": ["confidence"]} | options))


def test_a_model_without_options_has_empty_columns() -> None:
    cell = Cell("confidence", 0.9, 16, 16)
    assert list(columns_of(None)) == list(columns_of(cell))
    assert set(columns_of(None).values()) == {None}
