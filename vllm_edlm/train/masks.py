"""Who may attend to whom when noisy and clean tokens share one forward.

One predicate over (q_idx, kv_idx) serves the dense mask of SDPA and FlexAttention's block mask. It
is the paper's block-wise pattern with clean context (arXiv 2512.14067, section 3): a noisy block
sees itself and the clean blocks strictly before it; a clean block sees itself and clean blocks
before it, without causal order inside the block. Documents never see each other.

Shape legend: N rows, L tokens of a row, T tokens of the joint sequence ([x_t | x_0]: T = 2L).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

CLEAN = 0  # the copy id of x_0; noisy copies count from 1

MaskPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Where every token of the joint sequence stands; integer tensors of shape [N, T].

    `copy` is `CLEAN` or the number of the noisy copy, `block` counts within a document.
    """

    copy: Tensor
    document: Tensor
    block: Tensor


def doubled_grid(document_ids_NL: Tensor, position_ids_NL: Tensor, block_length: int) -> Grid:
    """The grid of the plain [x_t | x_0] layout, T = 2L."""
    block = torch.cat([position_ids_NL // block_length] * 2, dim=1)
    document = torch.cat([document_ids_NL] * 2, dim=1)
    clean = torch.full_like(document_ids_NL, CLEAN)
    return Grid(torch.cat([clean + 1, clean], dim=1), document, block)


def may_attend(grid: Grid) -> MaskPredicate:
    """The predicate `(row, head, q_idx, kv_idx) -> bool` in FlexAttention's calling form."""
    copy, document, block = grid.copy, grid.document, grid.block

    def predicate(row: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same_document = document[row, q] == document[row, kv]
        own_block = (copy[row, q] == copy[row, kv]) & (block[row, q] == block[row, kv])
        clean_past = (copy[row, kv] == CLEAN) & (block[row, kv] < block[row, q])
        return same_document & (own_block | clean_past)

    return predicate


def dense_mask(grid: Grid) -> Tensor:
    """Boolean mask [N, 1, T, T], True where attention is allowed (SDPA's convention)."""
    rows, tokens = grid.copy.shape
    row = torch.arange(rows, device=grid.copy.device).view(rows, 1, 1, 1)
    index = torch.arange(tokens, device=grid.copy.device)
    return may_attend(grid)(row, torch.zeros_like(row), index.view(tokens, 1), index)


def flex_mask(grid: Grid) -> BlockMask:
    """The same mask for FlexAttention, never materialised as [T, T]."""
    rows, tokens = grid.copy.shape
    return create_block_mask(
        may_attend(grid), rows, None, tokens, tokens, device=str(grid.copy.device)
    )
