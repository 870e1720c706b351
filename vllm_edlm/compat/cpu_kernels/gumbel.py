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

from .arrays import tiles

DRAFT_NOISE_SALT = 2**30
"""Added to the position of a draft, so that its noise is not that of its verification."""

TILE_ENTRIES = 2**15
"""Logits that are noised at a time: the dozen temporaries stay in a core's cache."""

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
    positions = pos.numpy()[:num_rows] + constexprs["IS_DRAFTING"] * DRAFT_NOISE_SALT
    dtype = np.float64 if constexprs["USE_FP64"] else np.float32
    noise = Noise(seeds.numpy()[slots], positions, vocab_size, dtype)
    divisor = np.where(temperatures == 0, np.float32(1), temperatures)[:, None]

    for rows, columns in tiles(num_rows, vocab_size, width, TILE_ENTRIES):
        scores = logits[rows, columns].float().numpy()
        if constexprs["APPLY_TEMPERATURE"]:
            scores = scores / divisor[rows]
        noised = noise.added(scores, rows, columns, temperatures[rows] != 0)
        groups = slice(columns.start // width, -(-columns.stop // width))
        token, value = _group_winners(noised, width)
        local_argmax.numpy()[rows, groups] = token + columns.start
        local_max.numpy()[rows, groups] = value


class Noise:
    """Standard Gumbel noise of a batch's logits rows, as vLLM's sampler draws it.

    Args:
        seeds: [T] int64 seed of each row's request.
        positions: [T] place of the row in its seed's stream.
        vocab_size: number of token ids, V.
        dtype: float32, or float64 for 53 random bits a token.
    """

    def __init__(
        self, seeds: np.ndarray, positions: np.ndarray, vocab_size: int, dtype: Any = np.float32
    ) -> None:
        domains = [0] if dtype == np.float32 else [0, HIGH_WORD_DOMAIN]
        self._streams = [stream_states(seeds, positions, domain) for domain in domains]
        self._ids = _scrambled_ids(vocab_size)
        self._dtype = dtype

    def of(self, rows: Any, tokens: Any) -> np.ndarray:
        """Noise of token ids in rows, of the shape that the two indices broadcast to."""
        words = [_finalized(_mix(states[rows], self._ids[tokens])) for states in self._streams]
        if len(words) == 1:
            return -np.log(-_log1p_neg(_uniform32(words[0])))
        return -np.log(-np.log(_uniform64(words[1], words[0])))

    def added(
        self, scores: np.ndarray, rows: slice, columns: slice, drawn: np.ndarray
    ) -> np.ndarray:
        """A tile's `scores` plus their noise in the rows where `drawn` [rows]; a new array."""
        noised = scores.astype(self._dtype)
        possible = drawn[:, None] & (scores > -np.inf)
        if np.count_nonzero(possible) > possible.size // 4:
            everywhere = self.of((np.arange(rows.start, rows.stop)[:, None]), columns)
            noised += everywhere * drawn[:, None].astype(self._dtype)
        else:  # after top-k or top-p few tokens are left, and noise is the costly part
            row, token = np.nonzero(possible)
            noised[row, token] += self.of(row + rows.start, token + columns.start)
        return noised


def stream_states(seeds: np.ndarray, positions: np.ndarray, domain: int = 0) -> np.ndarray:
    """MurmurHash3 (32 bits) of (seed, position), open for the token id: [T] uint32."""
    state = np.full(len(seeds), domain, np.uint32)
    for word in (seeds, seeds >> 32, positions):
        state = _mix(state, _scrambled((word & 0xFFFFFFFF).astype(np.uint32)))
    return state


def _group_winners(scores: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and value of the largest of every `width` columns of `scores` [rows, columns]."""
    padding = -scores.shape[1] % width
    if padding:
        scores = np.pad(scores, ((0, 0), (0, padding)), constant_values=-np.inf)
    grouped = scores.reshape(len(scores), -1, width)
    return grouped.argmax(-1) + np.arange(grouped.shape[1]) * width, grouped.max(-1)


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
    result = np.log(np.maximum(1 - u, np.float32(2**-24)))
    small = np.flatnonzero(u < np.float32(0.25))
    v = u.reshape(-1)[small]
    series = np.full_like(v, 1 / 8)
    for degree in range(7, 0, -1):
        series *= v
        series += np.float32(1 / degree)
    result.reshape(-1)[small] = -v * series
    return result
