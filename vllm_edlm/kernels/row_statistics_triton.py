"""The Triton kernel of `row_statistics`; importing this module needs Triton.

Legend for shapes: R rows, V vocabulary, C columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
# Fusing is explicit in the kernel: all its variants round alike.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Lanes are added up in fixed point: the order, which is the compiler's and differs between data
# types, must not show in the result. Sums up to 2 ** 24, the largest vocabulary, have room.
FIXED_POINT = tl.constexpr(2.0**38)
# Stands for -inf as a running maximum: differences to it are not NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _row_statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    row_stride,
    token_ptr,
    probability_ptr,
    vocab_size,
    mask_token_id,
    chooses: tl.constexpr,
    columns: tl.constexpr,
):
    """One row per program: each lane keeps its own maxima and sum, joined once at the end.

    With `chooses` the token is written to `token_ptr`, else read from there.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    lane_C = tl.arange(0, columns)
    top_C = tl.full((columns,), LOWEST, tl.float32)
    sum_C = tl.zeros((columns,), tl.float32)
    best_C = tl.full((columns,), float("-inf"), tl.float32)
    token_C = tl.full((columns,), vocab_size, tl.int32)
    num_tiles = tl.cdiv(vocab_size, columns)
    # From the end: the lower id, seen later, takes ties, and there is a token if all are -inf.
    for tile in range(num_tiles):
        id_C = (num_tiles - 1 - tile) * columns + lane_C
        x_C = tl.load(logits_ptr + id_C, mask=id_C < vocab_size, other=float("-inf"))
        x_C = x_C.to(tl.float32)
        # The smaller of old maximum and new logit is scaled: one exponential a logit.
        above_C = x_C - top_C
        scale_C = tl.exp(-tl.abs(above_C))
        sum_C = tl.where(above_C > 0, tl.fma(sum_C, scale_C, 1.0), sum_C + scale_C)
        top_C = tl.maximum(top_C, x_C)
        if chooses:
            # NaN is the largest of all, as in torch.
            takes_C = (x_C >= best_C) | (x_C != x_C)
            takes_C &= id_C != mask_token_id
            best_C = tl.where(takes_C, x_C, best_C)
            token_C = tl.where(takes_C, id_C, token_C)
    if chooses:
        is_nan_C = best_C != best_C
        largest = tl.max(tl.where(is_nan_C, float("-inf"), best_C), axis=0)
        has_nan = tl.max(is_nan_C.to(tl.int32), axis=0) == 1
        first_C = tl.where(has_nan, is_nan_C, best_C == largest)
        token = tl.min(tl.where(first_C, token_C, vocab_size), axis=0).to(tl.int64)
        tl.store(token_ptr + row, token)
    else:
        token = tl.load(token_ptr + row)
    top = tl.max(top_C, axis=0)
    sum_C *= tl.exp(top_C - top)
    # +inf and NaN leave NaN in their lane.
    is_broken_C = sum_C != sum_C
    sum_C = tl.where(is_broken_C, 0.0, sum_C)
    total = tl.sum((sum_C * FIXED_POINT).to(tl.int64), axis=0).to(tl.float32) / FIXED_POINT
    is_broken = tl.max(is_broken_C.to(tl.int32), axis=0) == 1
    share = tl.exp(tl.load(logits_ptr + token).to(tl.float32) - top) / total
    tl.store(probability_ptr + row, tl.where(is_broken | (total == 0), 0.0, share))


def row_statistics(logits_RV: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Token [R] int64 and confidence [R] float32 of `logits_RV` [R, V]."""
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64, device=logits_RV.device)
    return token_R, _launch(logits_RV, token_R, mask_token_id, chooses=True)


def probability(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """[R] float32 probability of the tokens [R] int64 under `logits_RV` [R, V]."""
    return _launch(logits_RV, token_R.contiguous(), -1, chooses=False)


def _launch(logits_RV: Tensor, token_R: Tensor, mask_token_id: int, chooses: bool) -> Tensor:
    num_rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1, "rows of logits must be contiguous"
    probability_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    _row_statistics_kernel[(num_rows,)](
        logits_RV,
        logits_RV.stride(0),
        token_R,
        probability_R,
        vocab_size,
        mask_token_id,
        chooses=chooses,
        columns=COLUMNS,
        **OPTIONS,
    )
    return probability_R
