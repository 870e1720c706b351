"""Load-aware block length: the more requests share a step, the shorter their blocks.

A step's cost grows with its rows once the matrix products are bound by arithmetic and no
longer by reading the weights. A long block buys tokens with idle arithmetic; a full batch has
none to spare. So the open positions of all requests together are kept to a budget.

A block's length is one of its request's ladder: its full block length, the half of it, and so
on while that is whole. A block begins at a multiple of its length (counted from where the
grid begins), so shorter blocks tile longer ones, and the end of a block tells where the next
one may begin. It is chosen when the block opens and stays until it is complete.

Legend for shapes: N requests.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_edlm.virtual_rows import Ints

# Shorter blocks save nothing: a block's commit costs as much as a denoise step.
SHORTEST = 4
# Open positions that a step holds at about the cost of reading the weights once: the ratio of
# arithmetic to bandwidth, for bf16, of common machines of either kind.
DEFAULT_BUDGET = {"cpu": 32, "other": 256}


def ladder(full_length: int) -> list[int]:
    """Block lengths that a request may have, the longest first."""
    lengths = [full_length]
    while _has_half(lengths[-1]):
        lengths.append(lengths[-1] // 2)
    return lengths


def _has_half(length: Any) -> Any:
    """Whether a ladder goes on below a length, a number or [N]."""
    return (length % 2 == 0) & (length // 2 >= SHORTEST)


def affordable_length(full_length: int, max_steps: int, num_requests: int, budget: int) -> int:
    """The longest length at which `num_requests` blocks stay within `budget` positions.

    No length is shorter than what one step reveals at least, `full_length / max_steps`: the
    block would take its one step all the same, and yield less.
    """
    lengths = [b for b in ladder(full_length) if b * max_steps >= full_length]
    return next((b for b in lengths if b * num_requests <= budget), lengths[-1])


def next_length(
    full_length: int, affordable: int, known: int, limit: int, *, is_first: bool
) -> int:
    """Length of the block that opens at `known`, positions counted from the grid's beginning.

    Args:
        affordable: the length wanted, one of the ladder.
        known: first position whose token is not known.
        limit: end of the positions that the model has.
        is_first: it is the request's first block, which may begin before `known`; any other
            begins there, and is as long as that place allows.
    """
    wanted = affordable
    if not is_first:
        wanted = next(b for b in ladder(full_length) if b <= affordable and known % b == 0)
    end = min(known // wanted * wanted + wanted, limit)
    columns = (np.array([x]) for x in (full_length, known, end, limit, is_first))
    return int(length_ending_at(*columns)[0])


def length_ending_at(
    full_length: Ints, known: Ints, end: Ints, limit: Ints, is_first: NDArray[np.bool_]
) -> Ints:
    """[N] the longest length at which the block that opens at `known` ends at `end`.

    So a block that opens is told by its end alone. All [N]; see `next_length`.
    """
    length = full_length
    while True:
        start = known // length * length
        fits = (np.minimum(start + length, limit) == end) & (is_first | (start == known))
        shorter = ~fits & _has_half(length)
        if not shorter.any():
            return length
        length = np.where(shorter, length // 2, length)
