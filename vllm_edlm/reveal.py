"""Reveal rules: which masked positions of a canvas become known after a denoise step.

Legend for shapes: N canvases, B positions in each.
"""

import torch
from torch import Tensor


def reveal_by_confidence(confidence_NB: Tensor, masked_NB: Tensor, threshold_N: Tensor) -> Tensor:
    """Masked positions whose confidence reaches the threshold.

    Args:
        confidence_NB: [N, B] probability of the token chosen for each position.
        masked_NB: [N, B] bool, the positions that are still open.
        threshold_N: [N] in (0, 1].

    Returns:
        [N, B] bool.
    """
    return masked_NB & (confidence_NB >= threshold_N[:, None])


def most_confident(confidence_NB: Tensor, masked_NB: Tensor, count_N: Tensor) -> Tensor:
    """The `count_N` most confident masked positions of each canvas.

    Ties go to the lower position. A canvas with fewer masked positions gives them all.

    Returns:
        [N, B] bool.
    """
    confidence_NB = confidence_NB.masked_fill(~masked_NB, -1.0)
    order_NB = confidence_NB.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(confidence_NB.shape[1], device=order_NB.device)
    rank_NB = torch.empty_like(order_NB).scatter_(1, order_NB, ranks.expand_as(order_NB))
    return masked_NB & (rank_NB < count_N[:, None])


def reveal(
    confidence_NB: Tensor, masked_NB: Tensor, threshold_N: Tensor, steps_left_N: Tensor
) -> Tensor:
    """Positions to reveal: the rule's choice, and enough to end the block in time.

    With m positions masked and `steps_left_N` denoise steps left, this one included, at least
    the ceil(m / steps left) most confident are revealed. That is one or more wherever anything
    is masked, so every step makes progress.

    Args:
        steps_left_N: [N] at least 1.

    Returns:
        [N, B] bool, a subset of `masked_NB`.
    """
    masked_left_N = masked_NB.sum(dim=1)
    at_least_N = (masked_left_N + steps_left_N - 1) // steps_left_N
    return reveal_by_confidence(confidence_NB, masked_NB, threshold_N) | most_confident(
        confidence_NB, masked_NB, at_least_N
    )
