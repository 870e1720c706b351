"""Where the loss is: mean cross entropy by masking ratio and by position in the block.

Shape legend: M masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Quarters: of the masking ratio 0..1, and of the block from its first position to its last.
BANDS = 4


class LossBands:
    """Running means over the masked tokens of many steps; updates never wait for the device."""

    def __init__(self, device: torch.device | str) -> None:
        # Sums of losses and numbers of tokens, the bands of the masking ratio first.
        self._totals = torch.zeros(2, 2 * BANDS, dtype=torch.float64, device=device)

    def update(
        self, loss_M: Tensor, p_mask_M: Tensor, position_M: Tensor, block_length: int
    ) -> None:
        """Count the masked tokens of one forward.

        Args:
            loss_M: cross entropy of each, in nats, not divided by the masking ratio.
            p_mask_M: masking ratio of its block, 0..1.
            position_M: position in its block, 0..block_length - 1.
            block_length: of these tokens; it may differ between calls.
        """
        by_ratio = (p_mask_M * BANDS).long().clamp(max=BANDS - 1)
        by_position = BANDS + position_M * BANDS // block_length
        band = torch.cat([by_ratio, by_position])
        loss = loss_M.detach().to(self._totals.dtype).repeat(2)
        self._totals[0].index_add_(0, band, loss)
        self._totals[1].index_add_(0, band, torch.ones_like(loss))

    def read(self, reduce: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """Mean losses since the last reading, in nats, and start anew.

        Args:
            reduce: sums a tensor over all processes, which must all read at the same step.

        Returns:
            "loss/mask_0.25-0.50" for masking ratios from 0.25 to below 0.50, "loss/position_..."
            for that quarter of the block; without those that no token fell into.
        """
        loss, count = reduce(self._totals).tolist()
        self._totals.zero_()
        return {
            name: total / tokens
            for name, total, tokens in zip(_NAMES, loss, count, strict=True)
            if tokens
        }


_NAMES = [
    f"loss/{axis}_{band / BANDS:.2f}-{(band + 1) / BANDS:.2f}"
    for axis in ("mask", "position")
    for band in range(BANDS)
]
