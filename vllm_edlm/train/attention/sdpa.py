"""SDPA in tiles of queries: memory that grows with T, and only keys that some query may see.

A noisy tile sees its own span and the clean tokens up to it, so about half of all keys are left
out. The backward pass computes every tile anew: no two tiles' masks are alive at once.

Shape legend: N rows, H query heads, G key heads, T tokens of the joint sequence, Q queries of a
tile, K keys that it sees, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_edlm.train.masks import Grid, dense_mask, mask_between

NAME = "edlm_sdpa"

# Masks [N, T, T] of up to this many elements are kept for all layers; longer sequences are tiled.
WHOLE_MASK = 2**23
TILE_QUERIES = 512


class Tile(NamedTuple):
    """Consecutive queries [Q], and the keys [K] that any of them may see in any row."""

    grid: Grid
    queries: Tensor
    keys: Tensor


def inputs(grid: Grid) -> dict[str, Any]:
    """The whole mask if it is small, else tiles."""
    rows, tokens = grid.copy.shape
    if rows * tokens * tokens <= WHOLE_MASK:
        return {"attention_mask": dense_mask(grid)}
    return {"tiles": tiles(grid)}


def tiles(grid: Grid) -> list[Tile]:
    """All queries in tiles of `TILE_QUERIES`, the last one shorter."""
    every = torch.arange(grid.copy.shape[1], device=grid.copy.device)
    return [_tile(grid, queries, every) for queries in every.split(TILE_QUERIES)]


def _tile(grid: Grid, queries: Tensor, every: Tensor) -> Tile:
    seen = mask_between(grid, queries, every).any(dim=0).any(dim=1).squeeze(0)
    return Tile(grid, queries, every[seen])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tiles: list[Tile] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` [N, H, T, D], `key`, `value` [N, G, T, D].

    Returns [N, T, H, D]. Raises ValueError if there is neither a mask nor tiles.
    """
    if tiles is not None:
        parts = [_attend(tile, query, key, value, **options) for tile in tiles]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None
    if attention_mask is None:
        raise ValueError(f"attn_implementation {NAME!r} needs the keywords of attention_inputs()")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _attend(
    tile: Tile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """One tile's output [N, H, Q, D]."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query.index_select(2, tile.queries),
            key.index_select(2, tile.keys),
            value.index_select(2, tile.keys),
            attn_mask=mask_between(*tile),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    output: Tensor = checkpoint(
        run, query, key, value, use_reentrant=False, preserve_rng_state=dropout > 0
    )
    return output
