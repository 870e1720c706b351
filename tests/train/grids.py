"""Joint sequences of a few rows, laid out as in training: noisy copies first, clean tokens last."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_edlm.train.masks import CLEAN, Grid, Pattern

# (pattern, causal_clean, noisy copies)
LAYOUTS = [
    (Pattern.block_clean, False, 1),
    (Pattern.block_clean, False, 3),
    (Pattern.block_clean, True, 2),
    (Pattern.block_noisy, False, 2),
    (Pattern.bidirectional, False, 2),
]
PAD = -1  # the document id of pads


def copy_ids(pattern: Pattern, copies: int) -> list[int]:
    """The copies in the order in which they stand."""
    noisy = list(range(CLEAN + 1, CLEAN + 1 + copies))
    return [*noisy, CLEAN] if pattern == Pattern.block_clean else noisy


def rows_of(*lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Document and position ids [N, L] of rows with documents of these lengths, the last a pad."""
    documents, positions = [], []
    for row in lengths:
        ids = [*range(len(row) - 1), PAD]
        documents.append([i for i, length in zip(ids, row, strict=True) for _ in range(length)])
        positions.append([position for length in row for position in range(length)])
    return torch.tensor(documents), torch.tensor(positions)


def joint_grid(
    rows: tuple[Tensor, Tensor],
    block_length: int,
    pattern: Pattern = Pattern.block_clean,
    causal_clean: bool = False,
    copies: int = 1,
) -> Grid:
    """The grid of all copies of the rows."""
    ids = copy_ids(pattern, copies)
    document, position = (x.repeat(1, len(ids)) for x in rows)
    copy = torch.tensor(ids).repeat_interleave(rows[0].shape[1]).expand_as(document)
    return Grid(copy, document, position // block_length, position, pattern, causal_clean)
