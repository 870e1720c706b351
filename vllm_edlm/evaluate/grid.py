"""The grid of decoding options that an evaluation goes through."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_edlm.bench.report import Row
from vllm_edlm.options import (
    REVEAL_RULES,
    Options,
    check_choice,
    check_count,
    request_options,
)
from vllm_edlm.reveal import RULES


@dataclass(frozen=True)
class Cell:
    """Options of all requests of one figure; `threshold` is None for a rule that takes none."""

    reveal: str
    threshold: float | None
    block_length: int
    max_steps: int

    @property
    def extra_args(self) -> dict[str, Any]:
        """As a request carries them."""
        options = {
            "diffusion_reveal": self.reveal,
            "diffusion_threshold": self.threshold,
            "diffusion_canvas_length": self.block_length,
            "diffusion_max_steps": self.max_steps,
        }
        return {key: value for key, value in options.items() if value is not None}

    @property
    def columns(self) -> Row:
        """For a table."""
        return {
            "reveal": self.reveal,
            "threshold": self.threshold,
            "block length": self.block_length,
            "max steps": self.max_steps,
        }


def columns_of(cell: Cell | None) -> Row:
    """A cell's columns, empty ones for a model without such options."""
    return cell.columns if cell is not None else dict.fromkeys(Cell("", None, 1, 1).columns)


def grid(
    options: Options,
    rules: Sequence[str],
    thresholds: Sequence[float] = (),
    block_lengths: Sequence[int] = (),
    max_steps: Sequence[int] = (),
) -> list[Cell]:
    """Every combination, each once.

    Args:
        options: what is served; its block length bounds the others.
        rules: reveal rules by name.
        thresholds: for every rule that takes one; none: the rule's own default.
        block_lengths: none: the served one.
        max_steps: denoise steps of a block at most; none: as many as it has positions.

    Raises:
        ValueError: a value that a request would be refused for.
    """
    for length in block_lengths:
        check_count("diffusion_canvas_length", length, options.block_length)
    for steps in max_steps:
        check_count("diffusion_max_steps", steps, options.block_length)
    cells = [
        Cell(rule, threshold, length, min(steps, length))
        for rule in rules
        for threshold in _thresholds(rule, thresholds)
        for length in block_lengths or [options.block_length]
        for steps in max_steps or [length]
    ]
    for cell in cells:
        request_options(cell.extra_args, options)
    return list(dict.fromkeys(cells))


def _thresholds(rule: str, thresholds: Sequence[float]) -> Sequence[float | None]:
    default = RULES[check_choice("diffusion_reveal", rule, REVEAL_RULES)].default
    return [None] if default is None else thresholds or [default]
