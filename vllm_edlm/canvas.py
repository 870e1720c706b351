"""The canvas: the B positions of a request's open block, and what a denoise step does to it.

An entry is a revealed token or the mask token; the mask token is never chosen, so it marks
exactly the masked positions. Entries below `offset`, the known part of the block, have no
meaning; entries from `width` on lie behind the end of a block cut short by the model's length.

Legend for shapes: N canvases, B entries in each, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

# Rows of logits are turned into fp32 in tiles of at most this many bytes.
TILE_BYTES = 64 * 2**20


def entries(canvas_NB: Tensor) -> Tensor:
    """[B] index of each entry."""
    return torch.arange(canvas_NB.shape[1], device=canvas_NB.device)


def open_canvas(
    canvas_NB: Tensor, offset_N: Tensor, is_new_N: Tensor, mask_token_id: int
) -> Tensor:
    """The canvas as it stands before a step.

    A new block is all masks. Entries from `offset_N` on up to the first mask were emitted by
    an earlier step and not accepted (else `offset_N` would stand behind them): masked again.

    Args:
        offset_N: [N] known positions of the block.
        is_new_N: [N] bool, the block has had no denoise step.

    Returns:
        [N, B].
    """
    was_emitted_NB = known_run(canvas_NB, offset_N, mask_token_id)
    return canvas_NB.masked_fill(is_new_N[:, None] | was_emitted_NB, mask_token_id)


def known_run(canvas_NB: Tensor, offset_N: Tensor, mask_token_id: int) -> Tensor:
    """[N, B] bool: entries from `offset_N` on up to the first mask."""
    is_open_NB = entries(canvas_NB) >= offset_N[:, None]
    is_mask_NB = (canvas_NB == mask_token_id) & is_open_NB
    return is_open_NB & (is_mask_NB.cumsum(dim=1) == 0)


def emitted_run(
    canvas_NB: Tensor, offset_N: Tensor, width_N: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """The new known run of each canvas, moved to the front.

    Returns:
        tokens [N, B], of which the first `count` of each row count, and count [N].
    """
    index_B = entries(canvas_NB)
    run_NB = known_run(canvas_NB, offset_N, mask_token_id) & (index_B < width_N[:, None])
    source_NB = (index_B + offset_N[:, None]).clamp_(max=canvas_NB.shape[1] - 1)
    return canvas_NB.gather(1, source_NB), run_NB.sum(dim=1)


def choose_tokens(logits_TV: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Greedy token and its confidence for every row of logits.

    The mask token is never chosen; the confidence is the softmax probability of the chosen
    token over the whole vocabulary. Ties go to the lowest token id. No [T, V] fp32 copy is
    made: rows are processed in tiles of `TILE_BYTES`.

    Returns:
        token [T] int64, confidence [T] float32.
    """
    num_rows, vocab_size = logits_TV.shape
    token_T = torch.empty(num_rows, dtype=torch.int64, device=logits_TV.device)
    confidence_T = torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device)
    rows_per_tile = max(1, TILE_BYTES // (4 * vocab_size))
    for start in range(0, num_rows, rows_per_tile):
        tile = slice(start, start + rows_per_tile)
        rows = logits_TV[tile].to(torch.float32, copy=True)
        normaliser = rows.logsumexp(dim=1)
        rows[:, mask_token_id] = -torch.inf
        token_T[tile] = rows.argmax(dim=1)
        chosen = rows.gather(1, token_T[tile, None]).squeeze(1)
        confidence_T[tile] = (chosen - normaliser).exp()
    return token_T, confidence_T
