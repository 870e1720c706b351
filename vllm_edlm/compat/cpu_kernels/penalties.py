"""Twins of the Triton kernels in `vllm/v1/worker/gpu/sample/penalties.py`.

Legend for shapes: T = logits rows, V = vocabulary, S = request slots, M = `max_model_len`.
`expanded_idx_mapping` [T] takes a logits row to its slot. A set of token ids is [S, ceil(V / 32)]
int32: bit i of word w stands for token 32 w + i.
"""

import numpy as np
import torch

from .arrays import ragged, row_tiles, unpack_bits


def penalties(
    logits: torch.Tensor,
    _logits_stride: int,
    expanded_idx_mapping: torch.Tensor,
    token_ids: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    repetition_penalty: torch.Tensor,
    frequency_penalty: torch.Tensor,
    presence_penalty: torch.Tensor,
    prompt_bin_mask: torch.Tensor,
    _prompt_bin_mask_stride: int,
    output_bin_counts: torch.Tensor,
    _output_bin_counts_stride: int,
    vocab_size: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_penalties_kernel`: penalise what the prompt and the output already hold.

    Edits `logits` [T, V]: of tokens in the prompt set or the output, those above 0 are divided
    by the repetition penalty ([S]) and others multiplied by it; then each occurrence in the
    output costs the frequency penalty, and being there the presence penalty ([S] each). A row's
    output is `output_bin_counts` [S, V] and the `expanded_local_pos` [T] drafts before it in its
    request: row t - p + i of `token_ids` [T] holds draft i.
    """
    slots = expanded_idx_mapping.numpy()[: len(logits)]
    strengths = [
        p.numpy()[slots] for p in (repetition_penalty, frequency_penalty, presence_penalty)
    ]
    used = (strengths[0] != 1) | (strengths[1] != 0) | (strengths[2] != 0)
    rows = np.flatnonzero(used)
    for tile in row_tiles(len(rows), vocab_size):
        at = rows[tile]
        counts = output_bin_counts.numpy()[slots[at], :vocab_size]
        _count_drafts(counts, at, expanded_local_pos.numpy()[at], token_ids.numpy())
        in_prompt = unpack_bits(prompt_bin_mask.numpy()[slots[at]], vocab_size)
        # Tokens that occur nowhere keep their logits, so only the others are gathered.
        row, token = np.divmod(np.flatnonzero(in_prompt | (counts > 0)), vocab_size)
        index = torch.from_numpy(at[row]), torch.from_numpy(token)
        values = logits[index].float().numpy()
        penalised = _penalised(values, counts[row, token], *(s[at[row]] for s in strengths))
        logits[index] = torch.from_numpy(penalised).to(logits.dtype)


def bincount(
    expanded_idx_mapping: torch.Tensor,
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    prompt_len: torch.Tensor,
    prefill_len: torch.Tensor,
    prompt_bin_mask: torch.Tensor,
    _prompt_bin_mask_stride: int,
    output_bin_counts: torch.Tensor,
    _output_bin_counts_stride: int,
    **_tile_sizes: int,
) -> None:
    """Twin of `_bincount_kernel`: book the tokens that a request begins with.

    For the slots in `expanded_idx_mapping`, adds the first `prompt_len` [S] tokens of
    `all_token_ids` [S, M] to the set `prompt_bin_mask`, and counts those from there to
    `prefill_len` [S] (output from before a preemption) in `output_bin_counts` [S, V].
    """
    slots, tokens = expanded_idx_mapping.numpy(), all_token_ids.numpy()
    prompts, prefills = prompt_len.numpy()[slots], prefill_len.numpy()[slots]

    row, place = ragged(prompts)
    word, bit = np.divmod(tokens[slots[row], place], 32)
    bits = np.left_shift(1, bit, dtype=np.int32)
    np.bitwise_or.at(prompt_bin_mask.numpy(), (slots[row], word), bits)

    row, offset = ragged(prefills - prompts)
    output = tokens[slots[row], prompts[row] + offset]
    np.add.at(output_bin_counts.numpy(), (slots[row], output), 1)


def _count_drafts(
    counts: np.ndarray, rows: np.ndarray, num_drafts: np.ndarray, token_ids: np.ndarray
) -> None:
    """Add the `num_drafts` [n] drafts before each of `rows` [n] to `counts` [n, V]."""
    row, offset = ragged(num_drafts)
    draft = token_ids[rows[row] - num_drafts[row] + 1 + offset]
    known = (draft >= 0) & (draft < counts.shape[1])
    np.add.at(counts, (row[known], draft[known]), 1)


def _penalised(
    logits: np.ndarray,
    counts: np.ndarray,
    repetition: np.ndarray,
    frequency: np.ndarray,
    presence: np.ndarray,
) -> np.ndarray:
    """Penalised logits of occurring tokens, all arguments [n], in the kernel's order of float32."""
    scaled = logits * np.where(logits > 0, np.float32(1) / repetition, repetition)
    lowered = scaled - frequency * counts.astype(np.float32)
    return lowered - presence * (counts > 0)
