"""The likeliest token of every row of logits, and the probability of a token.

That is all that greedy denoising reads of the logits. No fp32 copy of them is made outside a
bounded tile, and the logits are not modified. A row's result is the same to the bit whatever
rows lie beside it, and whether it comes in bf16 or fp16 or as their values in fp32.

Legend for shapes: R rows, V vocabulary, K chunks of it, C tokens in each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A tile of rows in fp32 and what is computed from it stay in the caches of a CPU.
TILE_BYTES = 4 * 2**20
# With more cores a tile has a row for each, up to this size.
MAX_TILE_BYTES = 64 * 2**20
# Torch vectorises `amax` and `softmax` on CPUs, `argmax` it does not: only one chunk of a row
# goes through that. Softmax is fastest, and adds up most exactly, over what the L1 cache holds.
CHUNK = 1024


class RowStatistics(NamedTuple):
    """What `row_statistics` yields.

    Attributes:
        token: [R] int64, the likeliest token but the mask token.
        confidence: [R] float32, its probability over the whole vocabulary.
    """

    token: Tensor
    confidence: Tensor


def row_statistics(logits_RV: Tensor, mask_token_id: int) -> RowStatistics:
    """Choose each row's token at temperature 0; on GPUs without waiting for the device.

    The lowest id wins ties; NaN counts as the largest of all. Where a row has no distribution,
    since every token is banned or a logit is +inf or NaN, the confidence is 0.

    Args:
        logits_RV: [R, V] bf16, fp16 or fp32, V at least 2; rows may be strided, each contiguous.
        mask_token_id: never chosen, even if every token is banned, but part of the distribution.
    """
    if logits_RV.is_cuda:
        from vllm_edlm.kernels import row_statistics_triton as kernel

        return RowStatistics(*kernel.row_statistics(logits_RV, mask_token_id))
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64, device=logits_RV.device)
    confidence_R = torch.empty_like(token_R, dtype=torch.float32)
    for rows, tile_RKC in _tiles(logits_RV):
        top_RK = tile_RKC.amax(dim=2)
        scale = _scale(tile_RKC, top_RK)
        token_R[rows], logit_R = _likeliest_(tile_RKC, top_RK, mask_token_id)
        confidence_R[rows] = _share(logit_R, *scale)
    return RowStatistics(token_R, confidence_R)


def probability(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """[R] float32 probability of each row's token; agrees with `row_statistics` to the bit.

    Args:
        logits_RV: [R, V] as there.
        token_R: [R] int64.
    """
    if logits_RV.is_cuda:
        from vllm_edlm.kernels import row_statistics_triton as kernel

        return kernel.probability(logits_RV, token_R)
    probability_R = torch.empty_like(token_R, dtype=torch.float32)
    for rows, tile_RKC in _tiles(logits_RV):
        logit_R = tile_RKC.flatten(1).gather(1, token_R[rows, None]).squeeze(1)
        probability_R[rows] = _share(logit_R, *_scale(tile_RKC, tile_RKC.amax(dim=2)))
    return probability_R


def _tiles(logits_RV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits [R, K, C] in a buffer of fp32, with -inf behind the vocabulary."""
    num_rows, vocab_size = logits_RV.shape
    num_chunks = -(-vocab_size // CHUNK)
    chunk_size = -(-vocab_size // num_chunks)
    row_bytes = 4 * num_chunks * chunk_size
    height = max(TILE_BYTES // row_bytes, torch.get_num_threads())
    height = max(1, min(height, MAX_TILE_BYTES // row_bytes, num_rows))
    shape = (height, num_chunks * chunk_size)
    buffer = torch.full(shape, -torch.inf, dtype=torch.float32, device=logits_RV.device)
    for start in range(0, num_rows, height):
        rows = slice(start, min(start + height, num_rows))
        tile = buffer[: rows.stop - start]
        tile[:, :vocab_size] = logits_RV[rows]
        yield rows, tile.unflatten(1, (num_chunks, chunk_size))


def _scale(logits_RKC: Tensor, top_RK: Tensor) -> tuple[Tensor, Tensor]:
    """[R] largest logit, and [R] sum of the exponentials of the differences to it.

    The largest share within a chunk is one over the chunk's own sum.
    """
    share_RK = logits_RKC.softmax(dim=2).amax(dim=2)
    top_R = top_RK.amax(dim=1)
    sum_RK = (top_RK - top_R[:, None]).exp_().div_(share_RK)
    # A chunk in which every token is banned has no shares.
    return top_R, sum_RK.masked_fill_(top_RK == -torch.inf, 0.0).sum(dim=1)


def _likeliest_(logits_RKC: Tensor, top_RK: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """[R] the first of the largest logits' ids, and [R] its logit; bans the mask token."""
    chunk_size = logits_RKC.shape[2]
    chunk, place = divmod(mask_token_id, chunk_size)
    logits_RKC[:, chunk, place] = -torch.inf
    top_RK[:, chunk] = logits_RKC[:, chunk].amax(dim=1)
    chunk_R = top_RK.argmax(dim=1)
    row_R = torch.arange(len(chunk_R), device=chunk_R.device)
    logit_R, place_R = logits_RKC[row_R, chunk_R].max(dim=1)
    token_R = chunk_R * chunk_size + place_R
    # If every token is banned the first has been found, be it the mask token.
    return token_R.clamp_(min=int(mask_token_id == 0)), logit_R


def _share(logit_R: Tensor, top_R: Tensor, sum_R: Tensor) -> Tensor:
    """[R] probability of a logit, 0 where there is none."""
    return ((logit_R - top_R).exp_() / sum_R).nan_to_num_(0.0)
