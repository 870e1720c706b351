"""Reveal rules: which masked positions of a canvas become known after a denoise step.

A rule gives every position a score, by which positions are ranked (higher first, ties to the
lower position), and accepts some of the masked ones. To add one, write a function, name it and
its default threshold with `@rule`, and test it: server and request options know it by that.

Legend for shapes: N canvases, B positions in each. A parameter `threshold_N1` is [N, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measures:
    """What a denoise step says about each position, all [N, B] float32.

    Attributes:
        confidence: probability of the token chosen for the position.
        margin: confidence less the largest probability of another token.
        entropy: entropy of the position's distribution, in nats.

    The last two are computed only where a rule in use needs them, and else are None.
    """

    confidence: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Ranked:
    """Masked positions in a rule's order.

    Attributes:
        rank: [N, B] int64, 0 for the position a rule would reveal first; masked ones lead.
        accepted: [N, B] bool, masked positions that the rule reveals by itself.
    """

    rank: Tensor
    accepted: Tensor


RuleFunction = Callable[[Measures, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(measures, masked [N, B], threshold [N, 1]) -> (score [N, B], accepted [N, B])."""


@dataclass(frozen=True)
class Rule:
    """A named reveal rule.

    Attributes:
        function: the rule itself.
        default: its threshold where none is given; None if it takes none.
        needs: the `Measures` that it reads besides the confidence.
    """

    function: RuleFunction
    default: float | None
    needs: str | None


RULES: dict[str, Rule] = {}


def rule(
    name: str, default: float | None, needs: str | None = None
) -> Callable[[RuleFunction], RuleFunction]:
    """Enter the decorated function into `RULES`."""

    def enter(function: RuleFunction) -> RuleFunction:
        RULES[name] = Rule(function, default, needs)
        return function

    return enter


@rule("confidence", default=0.9)
def by_confidence(
    measures: Measures, masked_NB: Tensor, threshold_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept what is at least as probable as the threshold."""
    return measures.confidence, measures.confidence >= threshold_N1


@rule("factor", default=1.0)
def by_factor(measures: Measures, masked_NB: Tensor, threshold_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Accept ranks r = 1, 2, ... while confidence >= 1 - threshold / (r + 1).

    The more positions are revealed together, the surer each of them has to be.
    """
    confidence = measures.confidence.masked_fill(~masked_NB, -torch.inf)
    ordered, order = confidence.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    fails = ordered < 1 - threshold_N1 / (rank + 1)
    return measures.confidence, _unsorted(fails.cumsum(dim=1) == 0, order)


@rule("entropy", default=0.1, needs="entropy")
def by_entropy(
    measures: Measures, masked_NB: Tensor, threshold_N1: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept the k lowest entropies, k as large as their sum less their maximum allows.

    That difference bounds what is lost by revealing dependent positions together.
    """
    assert measures.entropy is not None
    entropy = measures.entropy.masked_fill(~masked_NB, torch.inf)
    ordered, order = entropy.sort(dim=1, stable=True)
    before = torch.nn.functional.pad(ordered.cumsum(dim=1)[:, :-1], (1, 0))
    return -measures.entropy, _unsorted(before <= threshold_N1, order)


@rule("margin", default=0.8, needs="margin")
def by_margin(measures: Measures, masked_NB: Tensor, threshold_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Accept what is ahead of every other token by at least the threshold."""
    assert measures.margin is not None
    return measures.margin, measures.margin >= threshold_N1


@rule("prefix", default=0.9)
def by_prefix(measures: Measures, masked_NB: Tensor, threshold_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Accept from left to right while the confidence reaches the threshold."""
    fails = masked_NB & (measures.confidence < threshold_N1)
    position = torch.arange(masked_NB.shape[1], device=masked_NB.device)
    return -position.expand_as(masked_NB).float(), fails.cumsum(dim=1) == 0


@rule("steps", default=None)
def by_steps(measures: Measures, masked_NB: Tensor, threshold_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Accept nothing: the most confident are revealed as the steps of the block demand."""
    return measures.confidence, torch.zeros_like(masked_NB)


def _unsorted(values_NB: Tensor, order_NB: Tensor) -> Tensor:
    """Bring values in sorted order back to their positions."""
    return torch.empty_like(values_NB).scatter_(1, order_NB, values_NB)


def rank_positions(
    measures: Measures,
    masked_NB: Tensor,
    threshold_N: Tensor,
    rule_N: Tensor,
    rules_in_use: Sequence[int],
    forced_NB: Tensor | None = None,
) -> Ranked:
    """Rank the positions of each canvas by the rule of its request.

    Args:
        masked_NB: [N, B] bool, the positions that are still open.
        threshold_N: [N] parameter of each request's rule.
        rule_N: [N] index into `RULES`, in their order.
        rules_in_use: the values that occur in `rule_N`, known on the CPU.
        forced_NB: [N, B] bool, positions that must be revealed in this step.
    """
    functions = list(RULES.values())
    score = torch.zeros_like(measures.confidence)
    accepted = torch.zeros_like(masked_NB)
    for index in rules_in_use:
        score_NB, accepted_NB = functions[index].function(measures, masked_NB, threshold_N[:, None])
        uses_N1 = (rule_N == index)[:, None]
        score = torch.where(uses_N1, score_NB, score)
        accepted = torch.where(uses_N1, accepted_NB, accepted)
    if forced_NB is not None:
        accepted = accepted | forced_NB
    order = score.masked_fill(~masked_NB, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=order.device).expand_as(order)
    return Ranked(_unsorted(rank, order), accepted & masked_NB)


def reveal(ranked: Ranked, masked_NB: Tensor, steps_left_N: Tensor) -> Tensor:
    """Positions to reveal: what the rule accepts, and enough to end the block in time.

    With m positions masked and `steps_left_N` denoise steps left, this one included, at least
    the ceil(m / steps left) first in rank are revealed. That is one or more wherever anything
    is masked, so every step makes progress.

    Args:
        steps_left_N: [N] at least 1.

    Returns:
        [N, B] bool, a subset of `masked_NB`.
    """
    at_least_N = (masked_NB.sum(dim=1) + steps_left_N - 1) // steps_left_N
    return ranked.accepted | (masked_NB & (ranked.rank < at_least_N[:, None]))


def reveal_one(ranked: Ranked, masked_NB: Tensor, forced_NB: Tensor | None = None) -> Tensor:
    """[N, B] bool: the first position in rank alone, or the forced one where there is one."""
    first_NB = masked_NB & (ranked.rank == 0)
    if forced_NB is None:
        return first_NB
    return torch.where(forced_NB.any(dim=1, keepdim=True), forced_NB, first_NB)
