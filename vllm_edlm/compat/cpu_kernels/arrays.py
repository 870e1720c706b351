"""Array helpers that the CPU twins share: flat ragged ranges and views of raw memory."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch


def ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flatten a batch of ranges: row r contributes `0 .. lengths[r] - 1`.

    This is a kernel's "one program per row, loop over its elements" as two index arrays.
    A negative length is an empty range, as it is for a kernel's loop.

    Args:
        lengths: [rows] number of elements of each row.

    Returns:
        (row, offset), both [sum(lengths)] int64, in row order.
    """
    lengths = np.maximum(lengths, 0).astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return row, np.arange(len(row)) - first[row]


def spans(cumulative: torch.Tensor, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the first `num_rows` spans of a cumulative-sum tensor.

    Args:
        cumulative: [>= num_rows + 1] span borders, e.g. `query_start_loc`; vLLM pads it.
        num_rows: number of spans in use.

    Returns:
        (start, length), both [num_rows], dtype of `cumulative`.
    """
    borders = cumulative.numpy()[: num_rows + 1]
    return borders[:-1], np.diff(borders)


def int32_at(address: int, shape: Sequence[int]) -> np.ndarray:
    """Writable int32 view of `shape` on the memory at `address` (bytes).

    vLLM hands tables of several KV cache groups to a kernel as a tensor of data pointers. The
    view owns nothing: the tensor behind the address must outlive it, and `shape` must not reach
    beyond that tensor.
    """
    interface = {
        "version": 3,
        "typestr": np.dtype(np.int32).str,
        "data": (int(address), False),
        "shape": tuple(int(n) for n in shape),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
