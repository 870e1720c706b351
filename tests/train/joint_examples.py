"""Two packed rows, and the joint sequences that objectives make of them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vllm_edlm.train.documents import Document
from vllm_edlm.train.joint import corruptions_of, join
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.packing import PackedRows

B, L, MASK, EOS = 4, 24, 2, 1


def example_rows(count: int = 2) -> list[dict[str, Tensor]]:
    """Prompts that end inside a block, several documents in a row, and a pad in every other row."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for prompt, answer in ((6, 9), (3, 4), (5, 11), (1, 2)):
        tokens = torch.randint(3, 200, (prompt + answer,), generator=generator).tolist()
        documents.append(Document(tokens, [False] * prompt + [True] * answer))
    rows = list(islice(PackedRows(documents, L, B, EOS), count))
    assert [(row["document_ids"] < 0).any().item() for row in rows[:2]] == [False, True]
    return rows


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def objective(**changes: Any) -> Objective:
    return Objective(**{"block_length": B, "mask_token_id": MASK, **changes})


def joint(
    chosen: Objective,
    drop_unused: bool = True,
    rows: list[dict[str, Tensor]] | None = None,
    block_length: int | None = None,
) -> dict[str, Tensor]:
    """The batch of the example rows; `block_length` of the grid, not of the noise."""
    batch = stacked(rows or example_rows())
    corruptions = corruptions_of(batch, chosen, chosen.block_length)
    return join(batch, corruptions, chosen, block_length or chosen.block_length, drop_unused)
