"""Twins of the Triton kernels of vLLM's sampler that edit logits in place.

The kernels are those of temperature, `min_p`, `logit_bias` and `structured_outputs`
(v1/worker/gpu/sample, v1/worker/gpu).

Legend for shapes: T = logits rows, V = vocabulary, S = request slots, K = token ids a slot can
list, R = requests in the batch. `expanded_idx_mapping` [T] takes a logits row to its slot.
"""

import numpy as np
import torch

from .arrays import ragged, row_tiles, unpack_bits

NEVER = -float("inf")


def temperature(
    logits: torch.Tensor,
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,
    temperatures: torch.Tensor,
    _vocab_size: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_temperature_kernel`: divide `logits` [T, V] by each row's temperature ([S]).

    Rows of temperature 0 (greedy) stay as they are.
    """
    divisor = temperatures[expanded_idx_mapping[: len(logits)]].float()
    logits.div_(torch.where(divisor == 0, 1.0, divisor)[:, None])


def min_p(
    logits: torch.Tensor,
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,
    min_ps: torch.Tensor,
    vocab_size: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_min_p_kernel`: ban tokens less likely than `min_ps` [S] times the likeliest.

    Banned entries of `logits` [T, V] become minus infinity; a `min_p` of 0 bans none.
    """
    floor = min_ps[expanded_idx_mapping[: len(logits)]].float().log()[:, None]
    for tile in row_tiles(len(logits), vocab_size):
        rows = logits[tile]
        rows.masked_fill_(rows < rows.amax(-1, keepdim=True).float() + floor[tile], NEVER)


def bias(
    logits: torch.Tensor,
    _logits_stride: int,
    _vocab_size: int,
    expanded_idx_mapping: torch.Tensor,
    num_allowed_token_ids: torch.Tensor,
    allowed_token_ids: torch.Tensor,
    _allowed_token_ids_stride: int,
    num_logit_bias: torch.Tensor,
    bias_token_ids: torch.Tensor,
    _bias_token_ids_stride: int,
    biases: torch.Tensor,
    _bias_stride: int,
    pos: torch.Tensor,
    min_lens: torch.Tensor,
    num_stop_token_ids: torch.Tensor,
    restore_when_all_masked: torch.Tensor,
    stop_token_ids: torch.Tensor,
    _stop_token_ids_stride: int,
    **constexprs: int,
) -> None:
    """Twin of `_bias_kernel`: allowed tokens, then biases, then no stop before the minimum length.

    Edits `logits` [T, V]. The token ids and biases are [S, K], of which a slot's first `num_*`
    [S] count. A row ends no sequence shorter than `min_lens` [S] (prompt included): `pos` [T] is
    the position of its input token, so the row's own token sits one further. With
    CHECK_ALL_MASKED_ROWS, a row of a slot with `restore_when_all_masked` [S] that has no other
    token left keeps its stop tokens.
    """
    slots = expanded_idx_mapping.numpy()[: len(logits)]
    _allow_only(logits, *_listed(slots, num_allowed_token_ids.numpy()[slots], allowed_token_ids))

    num_biases = num_logit_bias.numpy()[slots]
    row, token = _listed(slots, num_biases, bias_token_ids)
    added = _listed(slots, num_biases, biases)[1]
    logits[row, token] = (logits[row, token] + added).to(logits.dtype)

    short = pos.numpy()[: len(slots)] + 1 < min_lens.numpy()[slots]
    num_stops = np.where(short, num_stop_token_ids.numpy()[slots], 0)
    row, token = _listed(slots, num_stops, stop_token_ids)
    stops = logits[row, token]
    logits[row, token] = NEVER
    if constexprs["CHECK_ALL_MASKED_ROWS"]:
        wanted = restore_when_all_masked[torch.from_numpy(slots)].bool()
        back = (wanted & (logits.amax(-1) == NEVER))[row] & stops.isfinite()
        logits[row[back], token[back]] = stops[back]


def apply_grammar_bitmask(
    logits: torch.Tensor,
    _logits_stride: int,
    logits_indices: torch.Tensor,
    cu_num_logits: torch.Tensor,
    bitmask: torch.Tensor,
    _bitmask_stride: int,
    vocab_size: int,
    **constexprs: int,
) -> None:
    """Twin of `_apply_grammar_bitmask_kernel`: ban every token that a grammar does not allow.

    Mask n of `bitmask` [masks, ceil(V / 32)] (a set bit allows) belongs to the logits row
    `logits_indices[n]` % MASK_STRIDE of request `logits_indices[n]` // MASK_STRIDE, counted from
    `cu_num_logits` [R + 1]; masks of rows the request does not have are skipped.
    """
    request, place = np.divmod(logits_indices.numpy()[: len(bitmask)], constexprs["MASK_STRIDE"])
    borders = cu_num_logits.numpy()
    used = np.flatnonzero(place < borders[request + 1] - borders[request])
    row = (borders[request] + place).astype(np.int64)
    for tile in row_tiles(len(used), vocab_size):
        masks = used[tile]
        banned = torch.from_numpy(~unpack_bits(bitmask.numpy()[masks], vocab_size))
        rows = torch.from_numpy(row[masks])
        logits[rows] = logits[rows].masked_fill_(banned, NEVER)


def _listed(
    slots: np.ndarray, counts: np.ndarray, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits row, and entry of `table` [S, K], for the first `counts` [T] entries of its slot."""
    row, offset = ragged(counts)
    row_index = torch.from_numpy(row)
    entries = table[torch.from_numpy(slots)[row_index].long(), torch.from_numpy(offset)]
    return row_index, entries if entries.is_floating_point() else entries.long()


def _allow_only(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> None:
    """Ban all but the given (row, token) pairs, in the rows among them."""
    kept = logits[row, token]
    logits.index_fill_(0, row.unique(), NEVER)
    logits[row, token] = kept
