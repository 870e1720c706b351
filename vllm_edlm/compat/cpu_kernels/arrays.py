"""Array helpers that the CPU twins share: ragged ranges, row tiles, bits, views of raw memory."""

from collections.abc import Iterator, Sequence
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


def row_tiles(num_rows: int, row_length: int, entries: int = 2**19) -> Iterator[slice]:
    """Cut rows into tiles of at most `entries` entries, or of one row where that is longer.

    What a twin makes for a tile then fits the cache of a core, and memory stays bounded for
    [rows, vocabulary] logits of any height: 2 MiB a float32 temporary.
    """
    height = max(1, entries // max(row_length, 1))
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def tiles(
    num_rows: int, row_length: int, group: int, entries: int
) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into (rows, columns) tiles of about `entries` entries.

    Tiles begin at multiples of `group` columns.
    """
    length = max(entries // group, 1) * group
    for start in range(0, row_length, length):
        columns = slice(start, min(start + length, row_length))
        for rows in row_tiles(num_rows, columns.stop - start, entries):
            yield rows, columns


def unpack_bits(words: np.ndarray, count: int) -> np.ndarray:
    """Bits of packed int32 words, lowest bit first, as vLLM packs sets of token ids.

    Args:
        words: [rows, >= 0] int32, each row contiguous.
        count: bits wanted of a row; those beyond the words are unset.

    Returns:
        [rows, count] bool.
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little").view(np.bool_)


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
