"""Twin of the Triton kernel in `vllm/v1/worker/gpu/sample/gumbel.py` that draws tokens.

A token is drawn as the argmax of logits plus Gumbel noise. The noise of a token is a hash of
(seed, position, token id), the same on every device, so a seed means here what it means on a GPU,
up to the rounding of the logarithms.

Legend for shapes: T = logits rows, V = vocabulary, S = request slots, G = groups of BLOCK_SIZE
tokens that cover the vocabulary. `expanded_idx_mapping` [T] takes a logits row to its slot.
"""

import functools
from typing import Any

import numpy as np
import torch

from .arrays import row_tiles

DRAFT_NOISE_SALT = 2**30
"""Added to the position of a draft, so that its noise is not that of its verification."""

HIGH_WORD_DOMAIN = 0x9E3779B9
"""Start of the second hash, which gives the upper half of a float64's random bits."""


def gumbel_sample(
    local_argmax: torch.Tensor,
    _local_argmax_stride: int,
    local_max: torch.Tensor,
    _local_max_stride: int,
    logits_cache: torch.Tensor | None,
    _logits_cache_stride_0: int,
    _logits_cache_stride_1: int,
    _logits_cache_col: torch.Tensor | None,
    _logits_cache_source: torch.Tensor | None,
    _logits_cache_source_stride: int,
    logits: torch.Tensor,
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,
    seeds: torch.Tensor,
    pos: torch.Tensor,
    temperature: torch.Tensor,
    vocab_size: int,
    **constexprs: int,
) -> None:
    """Twin of `_gumbel_sample_kernel`: the winner of each group of BLOCK_SIZE tokens.

    Writes `local_argmax` [T, G] int64 (token ids) and `local_max` [T, G] (their noised logits;
    float64 with USE_FP64). Reads `logits` [T, V], `seeds` [S] int64, `pos` [T], `temperature`
    [S]. Rows of temperature 0 and rows without a request (a negative mapping) get no noise;
    APPLY_TEMPERATURE divides the others' logits first. Of equal values the lowest id wins.

    Raises:
        NotImplementedError: for a cache of draft logits, which only speculative decoding keeps.
    """
    if logits_cache is not None:
        raise NotImplementedError(
            "speculative decoding with sampled drafts is not supported on CPU without Triton: "
            "leave out speculative_config"
        )
    num_rows, width = len(logits), constexprs["BLOCK_SIZE"]
    slots = expanded_idx_mapping.numpy()[:num_rows]
    temperatures = np.where(slots >= 0, temperature.numpy()[slots], 0).astype(np.float32)
    row_seeds = np.where(slots >= 0, seeds.numpy()[slots], 0)
    positions = pos.numpy()[:num_rows] + constexprs["IS_DRAFTING"] * DRAFT_NOISE_SALT
    scale = temperatures if constexprs["APPLY_TEMPERATURE"] else np.zeros_like(temperatures)

    winners, values = local_argmax.numpy(), local_max.numpy()
    first = np.arange(winners.shape[1]) * width
    for tile in row_tiles(num_rows, vocab_size):
        scores = _padded(_scaled(logits[tile], scale[tile]), len(first) * width, values.dtype)
        drawn = np.flatnonzero(temperatures[tile])
        noise = gumbel_noise(
            row_seeds[tile][drawn], positions[tile][drawn], vocab_size, values.dtype
        )
        scores[drawn, :vocab_size] += noise
        grouped = scores.reshape(len(scores), len(first), width)
        winners[tile] = grouped.argmax(-1) + first
        values[tile] = grouped.max(-1)


def gumbel_noise(
    seeds: np.ndarray, positions: np.ndarray, vocab_size: int, dtype: Any = np.float32
) -> np.ndarray:
    """Standard Gumbel noise for every token id, as vLLM's sampler draws it.

    Args:
        seeds: [rows] int64 seed of each row's request.
        positions: [rows] place in the seed's stream, non-negative.
        vocab_size: number of token ids, V.
        dtype: float32, or float64 for 53 random bits a token.

    Returns:
        [rows, V] of `dtype`.
    """
    low = _hash(seeds, positions, vocab_size)
    if np.dtype(dtype) == np.float32:
        return -np.log(-_log1p_neg(_uniform32(low)))
    high = _hash(seeds, positions, vocab_size, HIGH_WORD_DOMAIN)
    return -np.log(-np.log(_uniform64(high, low)))


def _scaled(logits: torch.Tensor, temperature: np.ndarray) -> np.ndarray:
    """`logits` [rows, V] as float32, divided by the rows' temperature where that is not 0."""
    divisor = np.where(temperature == 0, np.float32(1), temperature)
    return logits.float().numpy() / divisor[:, None]


def _padded(scores: np.ndarray, width: int, dtype: Any) -> np.ndarray:
    """`scores` [rows, V] as `dtype`, with minus infinity up to `width` columns."""
    padded = np.empty((len(scores), width), dtype)
    padded[:, : scores.shape[1]] = scores
    padded[:, scores.shape[1] :] = -np.inf
    return padded


def _hash(seeds: np.ndarray, positions: np.ndarray, vocab_size: int, domain: int = 0) -> np.ndarray:
    """MurmurHash3 of (seed, position, token id) in 32 bits: [rows, vocab_size] uint32."""
    state = np.full((len(seeds), 1), domain, np.uint32)
    for word in (seeds, seeds >> 32, positions):
        state = _mix(state, _scrambled((word & 0xFFFFFFFF).astype(np.uint32)[:, None]))
    return _finalized(_mix(state, _scrambled_ids(vocab_size)))


@functools.lru_cache(maxsize=4)
def _scrambled_ids(vocab_size: int) -> np.ndarray:
    """The token ids' part of the hash, which all rows share: [vocab_size] uint32."""
    return _scrambled(np.arange(vocab_size, dtype=np.uint32))


def _scrambled(word: np.ndarray) -> np.ndarray:
    return _rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mix(state: np.ndarray, scrambled: np.ndarray) -> np.ndarray:
    mixed = _rotated(state ^ scrambled, 13)
    mixed *= np.uint32(5)
    mixed += np.uint32(0xE6546B64)
    return mixed


def _finalized(state: np.ndarray) -> np.ndarray:
    """MurmurHash3's last step, in place; 16 is the length of what was hashed, in bytes."""
    state ^= np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state ^= state >> np.uint32(shift)
        state *= np.uint32(factor)
    state ^= state >> np.uint32(16)
    return state


def _rotated(word: np.ndarray, left: int) -> np.ndarray:
    rotated = word << np.uint32(left)
    rotated |= word >> np.uint32(32 - left)
    return rotated


def _uniform32(bits: np.ndarray) -> np.ndarray:
    """(bits + 1/2) / 2**32 as the nearest float32, exactly: both halves convert without error."""
    high = (bits >> np.uint32(16)).astype(np.float32)
    low = (bits & np.uint32(0xFFFF)).astype(np.float32)
    return high * np.float32(2**-16) + (low + np.float32(0.5)) * np.float32(2**-32)


def _uniform64(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The upper 53 of the 64 bits, as midpoints in the open interval (0, 1)."""
    bits = ((high.astype(np.uint64) << np.uint64(32)) | low) >> np.uint64(11)
    return np.minimum((bits.astype(np.float64) + 0.5) * 2**-53, 1 - 2**-53)


def _log1p_neg(u: np.ndarray) -> np.ndarray:
    """log(1 - u) as vLLM takes it: the eighth Taylor polynomial below 1/4, else the logarithm.

    A small u gives the large noise that decides a draw; log(1 - u) itself would round it off.
    """
    series = np.full_like(u, 1 / 8)
    for degree in range(7, 0, -1):
        series *= u
        series += np.float32(1 / degree)
    series *= -u
    direct = np.log(np.maximum(1 - u, np.float32(2**-24)))
    return np.where(u < np.float32(0.25), series, direct)
