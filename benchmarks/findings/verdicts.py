"""Whether a direction holds: the same sign for every seed, or none can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.findings.design import Claim, Term

HOLDS, FAILS = "holds", "does not hold"
DISAGREE, NO_DIFFERENCE = "seeds disagree", "no difference"
UNKNOWN = "not measured"

# By seed, what was measured at a term.
Values = Mapping[Term, Mapping[int, float]]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        word: one of the constants above.
        differences: one for each seed that has all of the claim's figures, in order of seeds.
    """

    claim: Claim
    word: str
    differences: tuple[float, ...]


def judge(claim: Claim, values: Values, margin: float) -> Verdict:
    """Compare the two sides seed by seed.

    Args:
        margin: differences up to it count as none.
    """
    differences = tuple(_differences(claim, values))
    return Verdict(claim, word_for(differences, margin), differences)


def word_for(differences: Sequence[float], margin: float) -> str:
    """A direction is told only where every seed shows it."""
    if not differences:
        return UNKNOWN
    if all(difference > margin for difference in differences):
        return HOLDS
    if all(difference < -margin for difference in differences):
        return FAILS
    if all(abs(difference) <= margin for difference in differences):
        return NO_DIFFERENCE
    return DISAGREE


def _differences(claim: Claim, values: Values) -> list[float]:
    terms = (*claim.more, *claim.less)
    seeds = set.intersection(*(set(values.get(term, {})) for term in terms))
    return [
        sum(values[term][seed] for term in claim.more)
        - sum(values[term][seed] for term in claim.less)
        for seed in sorted(seeds)
    ]
