"""Twins of the Triton kernels in `vllm/v1/worker/gpu/sample/logprob.py`.

Legend for shapes: T = logits rows, V = vocabulary, S = request slots, K = tokens reported a row
beside the chosen one. `expanded_idx_mapping` [T] takes a logits row to its slot.
"""

import numpy as np
import torch

from .arrays import ragged, row_tiles


def topk_log_softmax(
    output: torch.Tensor,
    logits: torch.Tensor,
    _logits_stride: int,
    topk_ids: torch.Tensor,
    _topk_ids_stride: int,
    _topk: int,
    vocab_size: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_topk_log_softmax_kernel`: log-probabilities of a few tokens a row.

    Writes `output` [T, 1 + K] float32: log softmax of `logits` [T, V] at `topk_ids` [T, 1 + K].
    """
    for tile in row_tiles(len(logits), vocab_size):
        scores = torch.log_softmax(logits[tile], dim=-1, dtype=torch.float32)
        output[tile] = scores.gather(-1, topk_ids[tile])


def ranks(
    output: torch.Tensor,
    logits: torch.Tensor,
    _logits_stride: int,
    token_ids: torch.Tensor,
    vocab_size: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_ranks_kernel`: how many tokens of a row are at least as likely as a given one.

    Writes `output` [T] for `token_ids` [T] in `logits` [T, V]. Ranks start at 1.
    """
    chosen = logits.gather(-1, token_ids[: len(logits), None].long())
    for tile in row_tiles(len(logits), vocab_size):
        output[tile] = (logits[tile] >= chosen[tile]).sum(-1)


def fill_logprob_token_ids(
    out_token_ids: torch.Tensor,
    _out_token_ids_stride: int,
    out_valid_mask: torch.Tensor,
    _out_valid_mask_stride: int,
    sampled_token_ids: torch.Tensor,
    topk_indices: torch.Tensor,
    _topk_indices_stride: int,
    expanded_idx_mapping: torch.Tensor,
    num_per_req_token_ids: torch.Tensor,
    per_req_token_ids: torch.Tensor,
    _per_req_token_ids_stride: int,
    **constexprs: int,
) -> None:
    """Twin of `_fill_logprob_token_ids_kernel`: which tokens a row reports.

    Writes `out_token_ids` [T, >= 1 + K] and `out_valid_mask` of that shape: column 0 is the
    sampled token ([T]); after it come the request's own `num_per_req_token_ids` [S] entries of
    `per_req_token_ids` [S, K'], or, where it has none, the first NUM_TOPK of `topk_indices`
    [T, >= NUM_TOPK]. Other entries are left as they are.
    """
    ids, valid = out_token_ids.numpy(), out_valid_mask.numpy()
    slots = expanded_idx_mapping.numpy()[: len(ids)]
    ids[:, 0] = sampled_token_ids.numpy()[: len(ids)]
    valid[:, 0] = True

    num_own = num_per_req_token_ids.numpy()[slots]
    row, column = ragged(num_own)
    ids[row, column + 1] = per_req_token_ids.numpy()[slots[row], column]
    valid[row, column + 1] = True

    num_topk = constexprs["NUM_TOPK"]
    likeliest = np.flatnonzero(num_own <= 0)
    ids[likeliest, 1 : num_topk + 1] = topk_indices.numpy()[likeliest, :num_topk]
    valid[likeliest, 1 : num_topk + 1] = True
