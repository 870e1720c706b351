"""The mask predicate against rules spelled out one pair at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.train.grids import LAYOUTS, copy_ids, joint_grid, rows_of
from vllm_edlm.train.masks import CLEAN, Pattern, dense_mask, flex_mask

# Documents of 5 and 3 tokens and pads; at block length 2 the documents end in a short block.
ROWS = rows_of([5, 3, 4], [11, 1])
L = 12


def allowed(
    row: int, q: int, kv: int, block_length: int, pattern: Pattern, causal: bool, copies: int
) -> bool:
    ids = copy_ids(pattern, copies)
    q_copy, kv_copy, q, kv = ids[q // L], ids[kv // L], q % L, kv % L
    documents, positions = (ids[row].tolist() for ids in ROWS)
    if documents[q] != documents[kv]:
        return False
    q_block, kv_block = positions[q] // block_length, positions[kv] // block_length
    if pattern == Pattern.bidirectional:
        return q_copy == kv_copy
    if pattern == Pattern.block_noisy:
        return q_copy == kv_copy and kv_block <= q_block
    if q_copy == CLEAN and causal:
        return kv_copy == CLEAN and positions[kv] <= positions[q]
    if q_copy == CLEAN:
        return kv_copy == CLEAN and kv_block <= q_block
    return kv_block < q_block if kv_copy == CLEAN else kv_copy == q_copy and kv_block == q_block


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
@pytest.mark.parametrize("block_length", [1, 2, 4, 16])
def test_dense_mask_equals_brute_force(
    pattern: Pattern, causal: bool, copies: int, block_length: int
) -> None:
    mask = dense_mask(joint_grid(ROWS, block_length, pattern, causal, copies))
    tokens = L * len(copy_ids(pattern, copies))
    assert mask.shape == (2, 1, tokens, tokens)
    for row in range(2):
        for q in range(tokens):
            for kv in range(tokens):
                expected = allowed(row, q, kv, block_length, pattern, causal, copies)
                assert mask[row, 0, q, kv] == expected, (row, q, kv)
    assert mask.any(dim=-1).all(), "softmax over no key at all is not a number"


def test_clean_half_is_block_causal_not_token_causal() -> None:
    clean = dense_mask(joint_grid(ROWS, 4))[1, 0, L:, L:]
    assert clean[0, 3], "a token sees later tokens of its own block"
    assert not clean[3, 4], "and none of the next block"


def test_causal_clean_tokens_attend_as_in_an_ar_model() -> None:
    mask = dense_mask(joint_grid(rows_of([L, 0]), 4, causal_clean=True))[0, 0]
    assert torch.equal(mask[L:, L:], torch.ones(L, L).tril().bool())
    assert mask[4, :L].nonzero().flatten().tolist() == [4, 5, 6, 7], (
        "noisy blocks see all of theirs"
    )


def test_causal_clean_without_clean_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="must be block_clean, not block_noisy"):
        joint_grid(ROWS, 4, Pattern.block_noisy, causal_clean=True)


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
def test_flex_attention_equals_dense_attention(pattern: Pattern, causal: bool, copies: int) -> None:
    # More than one sparse block of 128 tokens: some are full, some in part, some left out.
    rows = rows_of([100, 150, 10], [250, 10])
    grid = joint_grid(rows, 8, pattern, causal, copies)
    shape = (3, 2, 2, grid.copy.shape[1], 16)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind()
    expected = scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(grid))
    mask = flex_mask(grid)
    assert mask.sparsity() > 0
    flex = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(flex, expected, rtol=1e-4, atol=1e-5)
