"""The reveal rules, each as its definition reads.

A rule sees the masked positions of the open block in order, M of them, and names two things: the
order in which it would reveal them (indices, best first), and those it accepts in this step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What a rule knows of a masked position."""

    confidence: float
    margin: float
    entropy: float

    @classmethod
    def of(cls, logits: Tensor, token: int, mask_token_id: int) -> "Statistics":
        """From processed logits [V] and the chosen token; the mask token keeps its share."""
        q = logits.softmax(-1).tolist()
        rivals = [x for i, x in enumerate(q) if i not in (token, mask_token_id)]
        entropy = -sum(x * math.log(x) for x in q if x > 0)
        return cls(q[token], q[token] - max(rivals), entropy)


Verdict = tuple[list[int], set[int]]
"""Indices in order of preference, and the accepted ones."""
Rule = Callable[[Sequence[Statistics], float], Verdict]


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices by score, highest first; ties to the lowest position."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def confidence(positions: Sequence[Statistics], threshold: float) -> Verdict:
    scores = [p.confidence for p in positions]
    return ranked(scores), {i for i, score in enumerate(scores) if score >= threshold}


def margin(positions: Sequence[Statistics], threshold: float) -> Verdict:
    scores = [p.margin for p in positions]
    return ranked(scores), {i for i, score in enumerate(scores) if score >= threshold}


def entropy(positions: Sequence[Statistics], threshold: float) -> Verdict:
    order = ranked([-p.entropy for p in positions])
    sizes = []
    for k in range(1, len(order) + 1):
        first = [positions[i].entropy for i in order[:k]]
        if sum(first) - max(first) <= threshold:
            sizes.append(k)
    return order, set(order[: max(sizes)])


def factor(positions: Sequence[Statistics], threshold: float) -> Verdict:
    order = ranked([p.confidence for p in positions])
    accepted: set[int] = set()
    for rank, i in enumerate(order, start=1):
        if positions[i].confidence < 1 - threshold / (rank + 1):
            break
        accepted.add(i)
    return order, accepted


def prefix(positions: Sequence[Statistics], threshold: float) -> Verdict:
    accepted: set[int] = set()
    for i, position in enumerate(positions):
        if position.confidence < threshold:
            break
        accepted.add(i)
    return list(range(len(positions))), accepted


def steps(positions: Sequence[Statistics], _threshold: float) -> Verdict:
    return ranked([p.confidence for p in positions]), set()


RULES: dict[str, Rule] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "factor": factor,
    "prefix": prefix,
    "steps": steps,
}
DEFAULT_THRESHOLDS = {
    "confidence": 0.9,
    "margin": 0.8,
    "entropy": 0.1,
    "factor": 1.0,
    "prefix": 0.9,
    "steps": 1.0,  # not read
}


def choose_reveals(
    rule: str, positions: Sequence[Statistics], threshold: float, step: int, max_steps: int
) -> Verdict:
    """The order, and what is revealed: the accepted positions and the schedule's share."""
    order, accepted = RULES[rule](positions, threshold)
    share = math.ceil(len(order) / max(max_steps - step, 1))
    return order, accepted | set(order[:share])
