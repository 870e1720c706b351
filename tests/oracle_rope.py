"""Rotary positions of the oracle: plain, Llama 3's and YaRN's frequencies.

Sources: Llama 3 model card and the YaRN paper (arXiv 2309.00071); tests/unit/test_oracle_model.py
compares with transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rotary(length: int, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, H] of positions 0..T-1, the second half repeating the first."""
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    plain = rope["rope_theta"] ** -exponents
    frequencies = _SCALED[rope.get("rope_type", "default")](plain, rope)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos() * _magnitude(rope), angles.sin() * _magnitude(rope)


def head_size(config: Mapping[str, Any]) -> int:
    """H, which not every config.json names."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def query_scale(length: int, config: Mapping[str, Any]) -> Tensor:
    """Factor [T] of the queries at positions 0..T-1: 1, or Llama 4's growth with the position."""
    rope = config.get("rope_parameters") or {}
    period = rope.get("original_max_position_embeddings", 1)
    beta = rope.get("llama_4_scaling_beta", 0.0)
    return 1 + beta * torch.log1p((torch.arange(length) // period).float())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [..., T, H] turned by its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _llama_3(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, in between a mixture."""
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / rope["factor"] * (1 - kept)


def _yarn(plain: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """As Llama 3's, but the mixture is linear in the index of the frequency."""
    count, window = len(plain), rope["original_max_position_embeddings"]

    def index_of(turns: float) -> float:
        return count * math.log(window / (turns * 2 * math.pi)) / math.log(rope["rope_theta"])

    first = max(math.floor(index_of(rope["beta_fast"])), 0)
    last = min(math.ceil(index_of(rope["beta_slow"])), 2 * count - 1)
    scaled = ((torch.arange(count) - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (1 - scaled) + plain / rope["factor"] * scaled


def _magnitude(rope: Mapping[str, Any]) -> float:
    """YaRN's factor of cosine and sine."""
    if rope.get("rope_type") != "yarn":
        return 1.0
    terms = (1 + 0.1 * rope[key] * math.log(rope["factor"]) for key in ("mscale", "mscale_all_dim"))
    return next(terms) / next(terms)


_SCALED = {"default": lambda plain, _: plain, "llama3": _llama_3, "yarn": _yarn}
