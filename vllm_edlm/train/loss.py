"""Losses of single tokens, and how they add up to the training loss.

Shape legend: M tokens whose loss is asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# A vocabulary of 150,000 makes 0.6 MB of fp32 logits a token. Below some hundred tokens at a time
# the head's matrix would be read more often than pays.
LOGITS_BYTES = 256 * 2**20


def cross_entropies(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Cross entropy of every token, [M], fp32, in nats."""
    return functional.cross_entropy(logits_MV.float(), targets_M, reduction="none")


def divergences(teacher_logits_MV: Tensor, logits_MV: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || student) of every token, [M], fp32, in nats."""
    teacher, student = teacher_logits_MV.float(), logits_MV.float()
    return functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def tokens_per_slice(vocabulary: int) -> int:
    """How many tokens' fp32 logits fit into `LOGITS_BYTES`; at least one."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def in_slices(losses: Callable[..., Tensor], tokens: int, *inputs: Tensor) -> Tensor:
    """`losses(*inputs)` computed for at most `tokens` tokens at a time.

    Args:
        losses: maps tensors whose first dimension is the token to one loss a token.
        tokens: of a slice.
        inputs: tensors [M, ...].

    Returns:
        [M]. Slices are computed anew in the backward pass, so that no more than one slice's
        intermediate tensors, its logits above all, ever exist.
    """
    if len(inputs[0]) <= tokens:
        return losses(*inputs)
    slices = zip(*(tensor.split(tokens) for tensor in inputs), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in slices])


def masked_loss(losses_M: Tensor, p_mask_M: Tensor, count: Tensor) -> Tensor:
    """Loss over the masking ratio, summed, per masked token (Eq. 1 as trained), in nats.

    Args:
        losses_M: of masked tokens.
        p_mask_M: the masking ratio of each.
        count: masked tokens of the whole optimizer step, of which these may be a part.
    """
    return (losses_M / p_mask_M).sum() / count.clamp(min=1)
