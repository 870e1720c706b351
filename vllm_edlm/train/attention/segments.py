"""The mask as a few block-diagonal attentions, the only form that varlen kernels train with.

Block-causal attention is none: blocks of one document share keys. But it is a disjoint union of
some. Every block sees itself; and of two blocks, the bits of their numbers agree down to the
highest one that differs, where the later block has a 1. So at each bit, spans of blocks pair up,
and the later span of a pair sees the whole of the earlier one: log2(blocks) attentions, none of
which computes a pair that the mask forbids.

Shape legend: M = N * T tokens of all rows, Q queries and K keys of one block-diagonal attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_edlm.train.masks import CLEAN, Grid, Pattern


class Segments(NamedTuple):
    """Segment i of the queries sees segment i of the keys: all of it, or, if causal, up to itself.

    `queries` [Q] and `keys` [K] are indices into the M tokens, in the order of their segments.
    """

    queries: Tensor
    keys: Tensor
    query_lengths: list[int]
    key_lengths: list[int]
    causal: bool = False


def segments(grid: Grid) -> list[Segments]:
    """Disjoint attentions that make up what `may_attend(grid)` allows, own blocks first."""
    row = torch.arange(grid.copy.shape[0], device=grid.copy.device).view(-1, 1)
    document = _combine(row.expand_as(grid.copy), grid.document)
    home = _combine(document, grid.copy)  # the tokens of one copy of one document
    if grid.pattern == Pattern.bidirectional:
        return [_matched(grid, home)]
    past = document if grid.pattern == Pattern.block_clean else home
    parts = _own_blocks(grid, _combine(home, grid.block)) + _past_blocks(grid, past)
    return [part for part in parts if part.query_lengths]


def _own_blocks(grid: Grid, block: Tensor) -> list[Segments]:
    if not grid.causal_clean:
        return [_matched(grid, block)]
    clean = grid.copy == CLEAN
    return [
        _matched(grid, block, ~clean, ~clean),
        _matched(grid, block, clean, clean, causal=True),
    ]


def _past_blocks(grid: Grid, past: Tensor) -> list[Segments]:
    seen = grid.copy == CLEAN if grid.pattern == Pattern.block_clean else None
    levels = []
    for level in range(int(grid.block.max()).bit_length()):
        later = (grid.block >> level) % 2 == 1
        earlier = ~later if seen is None else ~later & seen
        levels.append(_matched(grid, _combine(past, grid.block >> level + 1), later, earlier))
    return levels


def _combine(major: Tensor, minor: Tensor) -> Tensor:
    """One number for each pair of numbers."""
    minor = minor - minor.min()
    return major * (minor.max() + 1) + minor


def _matched(
    grid: Grid,
    segment: Tensor,
    is_query: Tensor | None = None,
    is_key: Tensor | None = None,
    causal: bool = False,
) -> Segments:
    """Queries and keys of equal `segment` number; segments that lack either are left out."""
    segment = segment.flatten()
    order = _combine(segment, grid.position.flatten()).argsort(stable=True)
    queries = order if is_query is None else order[is_query.flatten()[order]]
    keys = order if is_key is None else order[is_key.flatten()[order]]
    queries, keys = (
        mine[torch.isin(segment[mine], segment[other])]
        for mine, other in ((queries, keys), (keys, queries))
    )
    query_lengths, key_lengths = _run_lengths(segment[queries]), _run_lengths(segment[keys])
    return Segments(queries, keys, query_lengths, key_lengths, causal)


def _run_lengths(segment: Tensor) -> list[int]:
    lengths: list[int] = segment.unique_consecutive(return_counts=True)[1].tolist()
    return lengths
