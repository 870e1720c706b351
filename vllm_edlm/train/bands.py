"""Where the loss is: its mean by masking ratio and by position in the block.

Shape legend: M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Quarters of the masking ratio 0..1.
BANDS = 4


class LossBands:
    """Running means over the masked tokens of many steps; updates never wait for the device."""

    def __init__(self, block_length: int, device: torch.device | str) -> None:
        # Sums of losses and numbers of tokens: by band of the masking ratio, then by position.
        self._totals = torch.zeros(2, BANDS + block_length, dtype=torch.float64, device=device)
        bands = [f"loss/mask_{i / BANDS:.2f}-{(i + 1) / BANDS:.2f}" for i in range(BANDS)]
        digits = len(str(block_length - 1))  # so that names sort as positions do
        self._names = [*bands, *(f"loss/position_{i:0{digits}}" for i in range(block_length))]

    def update(self, loss_M: Tensor, p_mask_M: Tensor, position_M: Tensor) -> None:
        """Count the masked tokens of one forward.

        Args:
            loss_M: loss of each as it is trained on, in nats, not divided by the masking ratio:
                cross entropy, with a teacher mixed with the divergence from it.
            p_mask_M: masking ratio of its block, 0..1.
            position_M: position in its block, 0..block_length - 1.
        """
        by_ratio = (p_mask_M * BANDS).long().clamp(max=BANDS - 1)
        band = torch.cat([by_ratio, BANDS + position_M])
        loss = loss_M.detach().to(self._totals.dtype).repeat(2)
        self._totals[0].index_add_(0, band, loss)
        self._totals[1].index_add_(0, band, torch.ones_like(loss))

    def read(self, reduce: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Mean losses since the last reading, in nats, and start anew.

        Args:
            reduce: sums a tensor over all processes, which must all read at the same step.

        Returns:
            "loss/mask_0.25-0.50" for masking ratios from 0.25 to below 0.50, "loss/position_3" for
            the fourth position of a block; without those that no token fell into.
        """
        loss, count = reduce(self._totals).tolist()
        self._totals.zero_()
        return {
            name: total / tokens
            for name, total, tokens in zip(self._names, loss, count, strict=True)
            if tokens
        }
