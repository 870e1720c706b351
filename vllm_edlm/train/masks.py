"""Who may attend to whom when noisy and clean tokens share one forward.

One predicate over (q_idx, kv_idx) serves dense masks, SDPA's tiles and FlexAttention's block mask.
It knows the attention patterns that the paper compares (arXiv 2512.14067, Table 1). Documents never
see each other, nor do noisy copies, and every token sees itself.

Shape legend: N rows, L tokens of a row, T tokens of the joint sequence ([x_t | x_0]: T = 2L).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

CLEAN = 0  # the copy id of x_0; noisy copies count from 1

MaskPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Pattern(StrEnum):
    """What a noisy token sees of its document.

    block_clean: its own noisy block and the clean blocks strictly before it; clean blocks see
        themselves and earlier clean ones (the paper's choice, section 3).
    block_noisy: the blocks of its own noisy copy up to its own; there are no clean tokens.
    bidirectional: all of its own noisy copy; there are no clean tokens.
    """

    block_clean = "block_clean"
    block_noisy = "block_noisy"
    bidirectional = "bidirectional"


@dataclass(frozen=True)
class Grid:
    """Where every token of the joint sequence stands; integer tensors of shape [N, T].

    `copy` is `CLEAN` or the number of the noisy copy; `block` and `position` count within a
    document. With `causal_clean` a clean token sees no later clean token of its own block either,
    as in models that are trained as AR models at the same time.
    """

    copy: Tensor
    document: Tensor
    block: Tensor
    position: Tensor
    pattern: Pattern = Pattern.block_clean
    causal_clean: bool = False

    def __post_init__(self) -> None:
        if self.causal_clean and self.pattern != Pattern.block_clean:
            raise ValueError(
                f"causal_clean needs clean tokens: the pattern must be {Pattern.block_clean}, "
                f"not {self.pattern}"
            )


class _Place(NamedTuple):
    copy: Tensor
    block: Tensor
    position: Tensor


def _block_clean(q: _Place, kv: _Place) -> Tensor:
    own_block = (q.copy == kv.copy) & (q.block == kv.block)
    return own_block | ((kv.copy == CLEAN) & (kv.block < q.block))


def _block_clean_causal(q: _Place, kv: _Place) -> Tensor:
    return _block_clean(q, kv) & ((q.copy != CLEAN) | (kv.position <= q.position))


def _block_noisy(q: _Place, kv: _Place) -> Tensor:
    return (q.copy == kv.copy) & (kv.block <= q.block)


def _bidirectional(q: _Place, kv: _Place) -> Tensor:
    return q.copy == kv.copy


_RULES = {
    Pattern.block_clean: _block_clean,
    Pattern.block_noisy: _block_noisy,
    Pattern.bidirectional: _bidirectional,
}


def may_attend(grid: Grid) -> MaskPredicate:
    """The predicate `(row, head, q_idx, kv_idx) -> bool` in FlexAttention's calling form."""
    rule = _block_clean_causal if grid.causal_clean else _RULES[grid.pattern]
    copy, document, block, position = grid.copy, grid.document, grid.block, grid.position

    def predicate(row: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        at_q = _Place(copy[row, q], block[row, q], position[row, q])
        at_kv = _Place(copy[row, kv], block[row, kv], position[row, kv])
        return (document[row, q] == document[row, kv]) & rule(at_q, at_kv)

    return predicate


def mask_between(grid: Grid, q: Tensor, kv: Tensor) -> Tensor:
    """Boolean mask [N, 1, Q, K] of the tokens `q` [Q] and `kv` [K]; True is allowed, as in SDPA."""
    row = torch.arange(grid.copy.shape[0], device=q.device).view(-1, 1, 1, 1)
    return may_attend(grid)(row, torch.zeros_like(row), q.view(-1, 1), kv)


def dense_mask(grid: Grid) -> Tensor:
    """The whole mask, [N, 1, T, T]: for short sequences."""
    every = torch.arange(grid.copy.shape[1], device=grid.copy.device)
    return mask_between(grid, every, every)


def flex_mask(grid: Grid) -> BlockMask:
    """The same mask for FlexAttention, which keeps no [T, T] tensor."""
    rows, tokens = grid.copy.shape
    device = grid.copy.device
    # Uncompiled, `create_block_mask` evaluates the predicate for all of [N, T, T] at once.
    create = create_block_mask if device.type == "cpu" else torch.compile(create_block_mask)
    return create(may_attend(grid), rows, None, tokens, tokens, device=str(device))
