"""The canvas: the B positions of a request's open block, and what a denoise step does to it.

An entry is a revealed token or the mask token; the mask token is never chosen, so it marks
exactly the masked positions. Entries below `offset`, the known part of the block, have no
meaning; entries from `width` on lie behind the block's end: a request's block may be shorter
than the served one, and the model's length may cut its last block short.

Legend for shapes: N canvases, B entries in each, R rows of logits, V vocabulary.
"""

import torch
from torch import Tensor

from vllm_edlm.kernels.row_statistics import probability, row_statistics


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


def open_entries(canvas_NB: Tensor, offset_N: Tensor, width_N: Tensor) -> Tensor:
    """[N, B] bool: the positions of each block that are not known, masked or revealed."""
    index_B = entries(canvas_NB)
    return (index_B >= offset_N[:, None]) & (index_B < width_N[:, None])


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


def place(cell_R: Tensor, value_R: Tensor, canvas_NB: Tensor) -> Tensor:
    """[N, B] with the rows' values in their cells, flat indices [R], and 0 elsewhere."""
    placed = torch.zeros_like(canvas_NB, dtype=value_R.dtype)
    placed.view(-1).scatter_(0, cell_R, value_R)
    return placed


def margin(logits_RV: Tensor, token_R: Tensor, mask_token_id: int) -> Tensor:
    """[R] probability of each row's token less the largest of another one but the mask token."""
    others_RV = logits_RV.scatter(1, token_R[:, None], -torch.inf)
    second_R = row_statistics(others_RV, mask_token_id).token
    return probability(logits_RV, token_R) - probability(logits_RV, second_R)


def entropy(logits_RV: Tensor) -> Tensor:
    """[R] entropy of each row's distribution, in nats."""
    return torch.special.entr(logits_RV.softmax(dim=1)).sum(dim=1).nan_to_num(0.0)
