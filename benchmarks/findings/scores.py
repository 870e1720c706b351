"""Where a model is measured, and what it reached there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.findings.task import Item


class Point(NamedTuple):
    """Where a model is measured.

    Attributes:
        block_length: of the requests.
        parallel: tokens that a step reveals.
    """

    block_length: int
    parallel: int

    @property
    def extra_args(self) -> dict[str, Any]:
        """As a request carries it: so many of the most confident positions, in every step."""
        return {
            "diffusion_reveal": "steps",
            "diffusion_canvas_length": self.block_length,
            "diffusion_max_steps": self.block_length // self.parallel,
        }


@dataclass(frozen=True)
class Score:
    """What a model reached at a point.

    Attributes:
        exact: share of answers that are right from beginning to end.
        states: share of right states; the first wrong one usually spoils those after it.
        tokens_per_forward: emitted tokens over denoise forwards.
    """

    exact: float
    states: float
    tokens_per_forward: float


def grade(answers: Sequence[str], items: Sequence[Item], tokens_per_forward: float) -> Score:
    """Compare answers with the right ones, state by state."""
    pairs = list(zip(answers, (item.answer for item in items), strict=True))
    right = [sum(a == b for a, b in zip(*pair, strict=False)) / len(pair[1]) for pair in pairs]
    exact = sum(answer == expected for answer, expected in pairs) / len(pairs)
    return Score(exact, sum(right) / len(right), tokens_per_forward)
