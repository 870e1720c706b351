"""The training loss of a masked block-diffusion model.

Shape legend: M masked tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def diffusion_loss(logits_MV: Tensor, targets_M: Tensor, p_mask_M: Tensor) -> Tensor:
    """Cross entropy over the masking ratio, averaged over masked tokens (Eq. 1 as trained), nats.

    The logits of a masked position predict that same position: there is no shift.
    """
    if targets_M.numel() == 0:
        return logits_MV.sum() * 0.0  # keeps the graph, so that every rank has gradients
    loss_M = cross_entropy(logits_MV.float(), targets_M, reduction="none")
    return (loss_M / p_mask_M).sum() / targets_M.numel()
