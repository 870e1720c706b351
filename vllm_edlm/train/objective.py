"""What a conversion learns: noise, attention pattern and loss, each a design axis of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from vllm_edlm.train.masks import Pattern
from vllm_edlm.train.noise import NOISE_KINDS, NoiseKind


@dataclass(frozen=True)
class Objective:
    """The training objective (arXiv 2512.14067, section 3); its defaults are the paper's choice.

    Attributes:
        block_length: tokens denoised together, B.
        mask_token_id: the token that stands for a masked one.
        noise: `position` draws a masking ratio per block and masks later positions more (Eq. 2);
            `uniform` draws one ratio per document.
        half_life_ratio: lambda of Eq. 2; smaller masks later positions more. Unused by `uniform`.
        noise_copies: independently masked copies of a row in one forward.
        seed: keys the noise, together with the row's running index.
        pattern: what a noisy token attends to beside its own block.
        token_shift: a position is predicted from the hidden state of the one before.
        ar_loss_weight: weight of the mean next-token cross entropy on the clean half, which then
            attends token-causally; 0 for a pure diffusion model.
        growth: block lengths trained with one after another, for equal shares of the steps; empty
            for `block_length` throughout.
        distillation_weight: share of the divergence from a teacher in the loss, against the cross
            entropy; 0 without a teacher.
    """

    block_length: int
    mask_token_id: int
    noise: NoiseKind = "position"
    half_life_ratio: float = 0.1
    noise_copies: int = 1
    seed: int = 0
    pattern: Pattern = Pattern.block_clean
    token_shift: bool = False
    ar_loss_weight: float = 0.0
    growth: tuple[int, ...] = ()
    distillation_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is out of range, and what cannot be combined.

        Raises:
            ValueError: the message names the attribute, its value and what is allowed.
        """
        self._check_ranges()
        self._check_growth()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name in ("block_length", "noise_copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.half_life_ratio > 0:
            raise ValueError(f"half_life_ratio must be above 0, got {self.half_life_ratio}")
        if self.noise not in NOISE_KINDS:
            raise ValueError(f"noise must be one of {', '.join(NOISE_KINDS)}, got {self.noise!r}")
        if not 0 <= self.ar_loss_weight < math.inf:
            raise ValueError(
                f"ar_loss_weight must be a finite number, at least 0, got {self.ar_loss_weight}"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"distillation_weight must be from 0 to 1, got {self.distillation_weight}"
            )

    def _check_growth(self) -> None:
        stages = self.stages
        rises = all(earlier < later for earlier, later in pairwise(stages))
        divides = all(length > 0 and self.block_length % length == 0 for length in stages)
        if not (rises and divides and stages[-1] == self.block_length):
            raise ValueError(
                f"growth must name rising block lengths that divide the block length and end with "
                f"it ({self.block_length}), got {','.join(map(str, stages))}"
            )

    def _check_combinations(self) -> None:
        if self.ar_loss_weight and not self.has_clean_half:
            raise ValueError(
                f"ar_loss_weight must be 0 with pattern {self.pattern}, which has no clean tokens "
                f"to predict the next one from; got {self.ar_loss_weight}"
            )
        if self.distillation_weight and (self.token_shift or not self.has_clean_half):
            raise ValueError(
                "distillation_weight must be 0 with token_shift or a pattern other than "
                f"{Pattern.block_clean}: a teacher has neither; got {self.distillation_weight}"
            )

    @property
    def has_clean_half(self) -> bool:
        """Whether clean tokens stand beside the noisy ones in the joint sequence."""
        return self.pattern == Pattern.block_clean

    @property
    def causal_clean(self) -> bool:
        """Whether clean tokens attend token-causally, as a next-token loss demands."""
        return self.ar_loss_weight > 0

    @property
    def stages(self) -> tuple[int, ...]:
        """Block lengths in the order they are trained with."""
        return self.growth or (self.block_length,)

    def block_length_at(self, step: int, steps: int) -> int:
        """The block length trained with at optimizer step `step` (from 0) of `steps`."""
        return self.stages[min(step * len(self.stages) // steps, len(self.stages) - 1)]
