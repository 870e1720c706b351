"""Twins of the Triton kernels in `vllm/v1/worker/gpu/input_batch.py`.

Legend for shapes: R = requests in the batch, S = request slots (`max_num_reqs`), T = tokens in
the batch, L = logits rows, M = `max_model_len`, K = draft tokens a request can hold. All counts
and positions are in tokens. `idx_mapping` [R] takes a batch row to its request slot.

Arguments come in the kernel's order, tensors where the kernel has pointers; strides and tile
sizes are ignored, because the arrays know their own. Every twin writes in place, and only what
its kernel writes. A token beyond a request's row is an IndexError here, where a kernel would
silently touch the next request's row.
"""

import numpy as np
import torch

from .arrays import ragged, spans


def prepare_prefill_inputs(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    _next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    prefill_lens: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    **_tile_sizes: int,
) -> None:
    """Twin of `_prepare_prefill_inputs_kernel`: copy scheduled prompt tokens to the input.

    Writes `input_ids` [T] and the first `num_lookahead` rows of `next_prefill_tokens`
    [lookahead, S] (0 beyond the prompt), for rows that still prefill; others are untouched.
    Reads `query_start_loc` [R + 1], `all_token_ids` [S, M], `prefill_lens` [S],
    `num_computed_tokens` [S].
    """
    slots = idx_mapping.numpy()
    starts, lengths = spans(query_start_loc, len(slots))
    prefilling = num_computed_tokens.numpy()[slots] < prefill_lens.numpy()[slots]
    slots, starts, lengths = slots[prefilling], starts[prefilling], lengths[prefilling]
    computed, tokens = num_computed_tokens.numpy()[slots], all_token_ids.numpy()

    row, offset = ragged(lengths)
    input_ids.numpy()[starts[row] + offset] = tokens[slots[row], computed[row] + offset]

    positions = computed + lengths + np.arange(num_lookahead)[:, None]  # [lookahead, R]
    in_prompt = positions < prefill_lens.numpy()[slots]
    following = tokens[slots, np.where(in_prompt, positions, 0)]
    next_prefill_tokens.numpy()[:num_lookahead, slots] = np.where(in_prompt, following, 0)


def prepare_pos_seq_lens(
    pos: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    max_num_reqs: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_prepare_pos_seq_lens_kernel`: positions and sequence lengths of the step.

    Writes `pos` [T] for every scheduled token and `seq_lens` [max_num_reqs] whole: computed +
    scheduled tokens for the R rows in use, 0 for the rest. Reads `query_start_loc` [R + 1],
    `num_computed_tokens` [S].
    """
    slots = idx_mapping.numpy()
    starts, lengths = spans(query_start_loc, len(slots))
    computed = num_computed_tokens.numpy()[slots]
    seq_lens.numpy()[: len(slots)] = computed + lengths
    seq_lens.numpy()[len(slots) : max_num_reqs] = 0
    row, offset = ragged(lengths)
    pos.numpy()[starts[row] + offset] = computed[row] + offset


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor,
    idx_mapping: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    prefill_len: torch.Tensor,
    draft_tokens: torch.Tensor,
    _draft_tokens_stride: int,
    cu_num_logits: torch.Tensor,
    logits_indices: torch.Tensor,
    **constexprs: int,
) -> None:
    """Twin of `_combine_sampled_and_draft_tokens_kernel`: end of each query, and its logits rows.

    A request's logits rows are the last tokens of its query. Writes `logits_indices` [L] for
    every row; for rows past their prompt also `input_ids` [T]: the last sampled token (unless
    that place is still prompt) and the drafts. Reads `last_sampled_tokens` [S, 1],
    `query_start_loc` [R + 1], `seq_lens` [>= R], `prefill_len` [S], `draft_tokens` [S, K],
    `cu_num_logits` [R + 1]. NUM_NEW_SAMPLED_TOKENS is 0 or 1 (default 1).
    """
    num_new = constexprs.get("NUM_NEW_SAMPLED_TOKENS", 1)
    slots = idx_mapping.numpy()
    first_logit, num_logits = spans(cu_num_logits, len(slots))
    query_end = query_start_loc.numpy()[1 : len(slots) + 1]
    logits_start = query_end - num_logits
    row, offset = ragged(num_logits)
    logits_indices.numpy()[first_logit[row] + offset] = logits_start[row] + offset

    inputs, prompt = input_ids.numpy(), prefill_len.numpy()[slots]
    seq_len = seq_lens.numpy()[: len(slots)]
    generating = seq_len > prompt
    if num_new > 0:
        fed_back = generating & (seq_len - num_logits >= prompt)
        last = last_sampled_tokens.view(-1).numpy()[slots[fed_back]]
        inputs[logits_start[fed_back]] = last
    num_drafts = np.where(generating, num_logits - num_new, 0)
    row, offset = ragged(num_drafts)
    place = query_end[row] - num_drafts[row] + offset
    inputs[place] = draft_tokens.numpy()[slots[row], offset]


def get_num_sampled_and_rejected(
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    prefill_len: torch.Tensor,
) -> None:
    """Twin of `_get_num_sampled_and_rejected_kernel`: what a step's logits rows came to.

    Writes `num_sampled` [R] (0 for rows whose prompt is not done) and `num_rejected` [R]
    (logits rows less sampled tokens, 0 for the same rows). Reads `seq_lens` [>= R],
    `cu_num_logits` [R + 1], `prefill_len` [S].
    """
    slots = idx_mapping.numpy()
    chunked = seq_lens.numpy()[: len(slots)] < prefill_len.numpy()[slots]
    sampled = num_sampled.numpy()[: len(slots)]
    sampled[chunked] = 0
    _, num_logits = spans(cu_num_logits, len(slots))
    num_rejected.numpy()[: len(slots)] = np.where(chunked, 0, num_logits - sampled)


def post_update(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None,
    _output_bin_counts_stride: int,
    sampled_tokens: torch.Tensor,
    _sampled_tokens_stride: int,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    total_len: torch.Tensor,
    **_launch_options: int,
) -> None:
    """Twin of `_post_update_kernel`: book a step's sampled tokens into the request state.

    Rows with a negative `idx_mapping` are skipped. Appends the first `num_sampled` [R] entries
    of `sampled_tokens` [R, >= max(num_sampled)] to `all_token_ids` [S, M] at `total_len` [S],
    counts them in `output_bin_counts` [S, vocabulary] (None: not kept), updates
    `last_sampled_tokens` [S, 1], and adds query length less `num_rejected` [R] to
    `num_computed_tokens` [S]; without `query_start_loc` the query length counts as 0.
    """
    batch = np.flatnonzero(idx_mapping.numpy() >= 0)
    slots, counts = idx_mapping.numpy()[batch], num_sampled.numpy()[batch]
    sampled, lengths = sampled_tokens.numpy(), total_len.numpy()

    row, offset = ragged(counts)
    tokens = sampled[batch[row], offset]
    all_token_ids.numpy()[slots[row], lengths[slots[row]] + offset] = tokens
    if output_bin_counts is not None:
        # Unbuffered, because a token that was sampled twice counts twice.
        np.add.at(output_bin_counts.numpy(), (slots[row], tokens), 1)

    some = counts > 0
    last = sampled[batch[some], counts[some] - 1]
    last_sampled_tokens.view(-1).numpy()[slots[some]] = last
    lengths[slots[some]] += counts[some]
    _add_computed(num_computed_tokens, slots, -num_rejected.numpy()[batch])
    if query_start_loc is not None:
        _, query_lens = spans(query_start_loc, len(idx_mapping))
        _add_computed(num_computed_tokens, slots, query_lens[batch])


def post_update_num_computed_tokens(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> None:
    """Twin of `_post_update_num_computed_tokens_kernel`: count every scheduled token as computed.

    Adds the query lengths of `query_start_loc` [R + 1] to `num_computed_tokens` [S].
    """
    slots = idx_mapping.numpy()
    _add_computed(num_computed_tokens, slots, spans(query_start_loc, len(slots))[1])


def expand_idx_mapping(
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    cu_num_logits: torch.Tensor,
    **_tile_sizes: int,
) -> None:
    """Twin of `_expand_idx_mapping_kernel`: the slot, and the rank in it, of each logits row.

    Writes `expanded_idx_mapping` [L] and `expanded_local_pos` [L]. Reads `cu_num_logits` [R + 1].
    """
    slots = idx_mapping.numpy()
    first_logit, num_logits = spans(cu_num_logits, len(slots))
    row, offset = ragged(num_logits)
    expanded_idx_mapping.numpy()[first_logit[row] + offset] = slots[row]
    expanded_local_pos.numpy()[first_logit[row] + offset] = offset


def _add_computed(num_computed: torch.Tensor, slots: np.ndarray, delta: np.ndarray) -> None:
    """Add `delta` [R] tokens to `num_computed` [S] at `slots` [R] (distinct slots)."""
    num_computed.numpy()[slots] += delta
