"""Gumbel noise of the oracle, in plain Python: one number per (seed, counter, token id).

Source of the numbers: vLLM's `v1/worker/gpu/sample/gumbel.py` in its 32-bit form.
"""

import math
import struct
from collections.abc import Iterable

WORD = 0xFFFFFFFF
# Where 1 - u vanishes in fp32, as far as the logarithm is ever taken.
LEAST = 2.0**-24


def murmur3(words: Iterable[int]) -> int:
    """MurmurHash3 (x86, 32 bits, seed 0) of a message of little-endian 32-bit words."""
    h, length = 0, 0
    for word in words:
        key = _rotate(word * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        h = (_rotate(h ^ key, 13) * 5 + 0xE6546B64) & WORD
        length += 4
    h ^= length
    h = (h ^ h >> 16) * 0x85EBCA6B & WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & WORD
    return h ^ h >> 16


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & WORD


def uniform(seed: int, counter: int, token: int) -> float:
    """A number of (0, 1], rounded to fp32; `seed` is a signed 64-bit integer."""
    random = murmur3((seed & WORD, seed >> 32 & WORD, counter & WORD, token))
    return struct.unpack("f", struct.pack("f", (random + 0.5) * 2.0**-32))[0]


def gumbel(seed: int, counter: int, token: int) -> float:
    """Standard Gumbel noise, -log(-log(1 - u)): small `u` makes large noise."""
    return -math.log(-math.log1p(-min(uniform(seed, counter, token), 1 - LEAST)))
