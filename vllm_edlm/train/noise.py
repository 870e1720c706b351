"""Which tokens of a block are masked, and with which probability.

Corruption is a function of (seed, epoch, sample index, copy) alone, so it is the same with any
number of data workers, any batch size and after a resume.

Shape legend: N rows, L tokens of a row, K blocks of a row, B block length.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NoiseKind = Literal["position", "uniform"]

# Smallest masking ratio: the loss divides by it (reference recipe of arXiv 2512.14067).
MIN_RATIO = 1e-3


class Corruption(NamedTuple):
    """`masked` (bool) and the masking ratio `p_mask` that the loss divides by; both [N, L]."""

    masked: Tensor
    p_mask: Tensor


def draw(seed: int, epoch: int, samples: list[int], copy: int, numbers: int) -> Tensor:
    """Uniform numbers in [0, 1) of shape [N, numbers], one independent stream per sample."""
    return torch.stack([_stream(f"{seed}/{epoch}/{s}/{copy}", numbers) for s in samples])


def _stream(key: str, numbers: int) -> Tensor:
    # Hashing keeps neighbouring samples independent; a sum of the parts would collide.
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(numbers, generator=generator, dtype=torch.float64)


def numbers_needed(kind: NoiseKind, length: int, block_length: int) -> int:
    """How many uniform numbers `corrupt` uses up for one row of `length` tokens."""
    return length + (-(-length // block_length) if kind == "position" else 1)


def corrupt(
    kind: NoiseKind,
    uniforms: Tensor,
    in_loss_NL: Tensor,
    block_length: int,
    half_life_ratio: float,
) -> Corruption:
    """Corrupt rows by the named kind; `uniforms` comes from `draw` with `numbers_needed`."""
    if kind == "position":
        return position_noise(uniforms, in_loss_NL, block_length, half_life_ratio)
    return uniform_noise(uniforms, in_loss_NL)


def uniform_noise(uniforms: Tensor, in_loss_NL: Tensor) -> Corruption:
    """One ratio t per sequence, every token masked independently with probability t."""
    ratio_N1 = MIN_RATIO + (1 - MIN_RATIO) * uniforms[:, :1]
    masked = (uniforms[:, 1:] < ratio_N1) & in_loss_NL
    return Corruption(masked, ratio_N1.expand_as(uniforms[:, 1:]).float())


def position_noise(
    uniforms: Tensor, in_loss_NL: Tensor, block_length: int, half_life_ratio: float
) -> Corruption:
    """Position-dependent masking (Eq. 2): per block a ratio m, and exactly round(m * len) masks.

    Later positions are likelier to be masked, the more so the smaller m and the smaller the
    half-life ratio are: the log-weight of position i is ln2 / (ratio * B) * (1 - m) * i, with B the
    nominal block length even in a short last block. Positions outside the loss are un-masked after
    the choice, which leaves the ratio of the others as it was drawn.

    Raises:
        ValueError: the half-life ratio is not positive.
    """
    if not half_life_ratio > 0:
        raise ValueError(f"half-life ratio must be greater than 0, got {half_life_ratio}")
    length = in_loss_NL.shape[1]
    blocks = -(-length // block_length)
    ratio_NK = MIN_RATIO + (1 - MIN_RATIO) * uniforms[:, :blocks]
    strength = math.log(2) / (half_life_ratio * block_length)
    position_B = torch.arange(block_length, device=uniforms.device)
    log_weight_NKB = strength * (1 - ratio_NK)[..., None] * position_B
    exists_KB = _in_blocks(torch.ones(1, length, device=uniforms.device), block_length)[0] > 0
    gumbel_NKB = _in_blocks(-torch.log(-torch.log(uniforms[:, blocks:])), block_length)
    score_NKB = (log_weight_NKB + gumbel_NKB).masked_fill(~exists_KB, -math.inf)
    count_NK = (ratio_NK * exists_KB.sum(-1)).round()
    masked_NKB = _rank_from_top(score_NKB) < count_NK[..., None]
    masked_NL = masked_NKB.flatten(1)[:, :length] & in_loss_NL
    p_mask_NL = ratio_NK.repeat_interleave(block_length, dim=1)[:, :length]
    return Corruption(masked_NL, p_mask_NL.float())


def _in_blocks(values_NL: Tensor, block_length: int) -> Tensor:
    """[N, L] -> [N, K, B], a short last block filled with zeros."""
    missing = -values_NL.shape[1] % block_length
    padded = torch.nn.functional.pad(values_NL, (0, missing))
    return padded.unflatten(1, (-1, block_length))


def _rank_from_top(score: Tensor) -> Tensor:
    """Rank of every entry along the last axis, 0 for the largest."""
    return score.argsort(dim=-1, descending=True).argsort(dim=-1)
