"""Which tokens of a block are masked, and with which probability.

Corruption is a function of (seed, sample, copy) alone, where `sample` is the row's running index
over all passes through the data. So it is the same with any number of processes and data workers,
any batch size and after a resume.

Shape legend: N rows, L tokens of a row, K blocks of a row, B block length.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

NoiseKind = Literal["position", "uniform"]
NOISE_KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)

# Smallest masking ratio: the loss divides by it (reference recipe of arXiv 2512.14067).
MIN_RATIO = 1e-3


class Corruption(NamedTuple):
    """`masked` (bool) and the masking ratio `p_mask` that the loss divides by; both [N, L]."""

    masked: Tensor
    p_mask: Tensor


def draw(seed: int, samples: list[int], copy: int, numbers: int) -> Tensor:
    """Uniform numbers in [0, 1) of shape [N, numbers], one independent stream per sample."""
    return torch.stack([_stream(f"{seed}/{sample}/{copy}", numbers) for sample in samples])


def _stream(key: str, numbers: int) -> Tensor:
    # Hashing keeps neighbouring samples independent; a sum of the parts would collide.
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(numbers, generator=generator, dtype=torch.float64)


def numbers_needed(length: int, block_length: int) -> int:
    """How many uniform numbers `corrupt` uses up for one row of `length` tokens.

    One per token and one per block: the block's masking ratio, or that of one of the documents,
    which are never more than the blocks.
    """
    return length + -(-length // block_length)


def corrupt(
    kind: NoiseKind,
    uniforms: Tensor,
    in_loss_NL: Tensor,
    document_NL: Tensor,
    block_length: int,
    half_life_ratio: float,
) -> Corruption:
    """Corrupt rows by the named kind; `uniforms` comes from `draw` with `numbers_needed`."""
    if kind == "position":
        return position_noise(uniforms, in_loss_NL, block_length, half_life_ratio)
    return uniform_noise(uniforms, in_loss_NL, document_NL)


def uniform_noise(uniforms: Tensor, in_loss_NL: Tensor, document_NL: Tensor) -> Corruption:
    """One ratio t per document, every token of it masked independently with probability t.

    Args:
        uniforms: [N, R + L]; the first R are for the ratios of up to R documents.
        in_loss_NL: bool; other tokens stay as they are.
        document_NL: number of the token's document in its row, from 0; negative on a pad.
    """
    length = in_loss_NL.shape[1]
    ratio_NR = MIN_RATIO + (1 - MIN_RATIO) * uniforms[:, :-length]
    ratio_NL = ratio_NR.gather(1, document_NL.clamp(min=0))
    masked_NL = (uniforms[:, -length:] < ratio_NL) & in_loss_NL
    return Corruption(masked_NL, ratio_NL.float())


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
