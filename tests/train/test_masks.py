"""The mask predicate against rules spelled out one pair at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vllm_edlm.train.masks import dense_mask, doubled_grid, flex_mask

# Row 0: documents of 5, 3 and 4 tokens at block length 2 (the first two end in a short block).
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [0] * 12])
POSITIONS = torch.tensor([[*range(5), *range(3), *range(4)], [*range(12)]])


def allowed(row: int, q: int, kv: int, block_length: int) -> bool:
    """Brute force: [x_t | x_0] of 12 + 12 tokens."""
    q_clean, kv_clean = q >= 12, kv >= 12
    q, kv = q % 12, kv % 12
    if DOCUMENTS[row, q] != DOCUMENTS[row, kv]:
        return False
    q_block = int(POSITIONS[row, q]) // block_length
    kv_block = int(POSITIONS[row, kv]) // block_length
    if q_clean:
        return kv_clean and kv_block <= q_block
    return kv_block < q_block if kv_clean else kv_block == q_block


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 16])
def test_dense_mask_equals_brute_force(block_length: int) -> None:
    mask = dense_mask(doubled_grid(DOCUMENTS, POSITIONS, block_length))
    assert mask.shape == (2, 1, 24, 24)
    for row in range(2):
        for q in range(24):
            for kv in range(24):
                expected = allowed(row, q, kv, block_length)
                assert mask[row, 0, q, kv] == expected, (row, q, kv)


def test_clean_half_is_block_causal_not_token_causal() -> None:
    clean = dense_mask(doubled_grid(DOCUMENTS, POSITIONS, 4))[1, 0, 12:, 12:]
    assert clean[0, 3], "a token sees later tokens of its own block"
    assert not clean[3, 4], "and none of the next block"


def test_flex_attention_equals_dense_attention() -> None:
    grid = doubled_grid(DOCUMENTS, POSITIONS, 4)
    q, k, v = torch.randn(3, 2, 2, 24, 16, generator=torch.Generator().manual_seed(0)).unbind()
    expected = scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(grid))
    try:
        flex = flex_attention(q, k, v, block_mask=flex_mask(grid))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch build runs no FlexAttention here: {error}")
    torch.testing.assert_close(flex, expected, rtol=1e-4, atol=1e-5)
