"""What a finding is: arms that are compared, and directions that the paper gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.findings.conversions import Conversion
from benchmarks.findings.scores import Point

SEEDS = (0, 1, 2)
PARALLEL = (1, 2, 4, 8)
ATTENTION, FFN = "attention", "FFN"

Where = Point | str  # a point of decoding, or a part of the layers
Term = tuple[str, Where]  # an arm's label, and where


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Attributes:
        conversion: with the first seed.
        points: where it is measured.
        paper: the paper's figures, for the first points in order.
    """

    label: str
    conversion: Conversion
    points: tuple[Point, ...]
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A direction: the sum of `more` is larger than that of `less`."""

    text: str
    more: tuple[Term, ...]
    less: tuple[Term, ...]


@dataclass(frozen=True)
class Finding:
    """One of the paper's findings.

    Attributes:
        name: file stem.
        drift: it is about weights, not about answers.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    drift: bool = False


def points(block_length: int, parallel: tuple[int, ...] = PARALLEL) -> tuple[Point, ...]:
    """One block length at every parallelism that it allows."""
    return tuple(Point(block_length, p) for p in parallel if p <= block_length)


def with_seed(conversion: Conversion, seed: int) -> Conversion:
    """The same conversion with other noise and another order of the data."""
    return replace(conversion, seed=seed)
