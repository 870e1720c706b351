"""Tiles of logits: of bounded size, and of few sizes.

Every step has another number of masked positions. Were each tile as high as its rows, every
height would have its own memory: what was freed for one does not fit the next, and an allocator
keeps it all.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

# Of a tile. A GPU reads the head anew for every tile, and is done with one soon.
TILE_BYTES, GPU_TILE_BYTES = 32 * 2**20, 64 * 2**20

Columns = dict[str, Tensor]
"""What rows yield: tensors [R, ...] by name."""


def tiles(num_rows: int, row_bytes: int, *, on_gpu: bool = False) -> Iterator[slice]:
    """Slices of rows of at most `TILE_BYTES` (`GPU_TILE_BYTES`), but of one row at least."""
    limit = max((GPU_TILE_BYTES if on_gpu else TILE_BYTES) // row_bytes, 1)
    power = 1 << (limit.bit_length() - 1)
    height = power // 2 * 3 if 2 <= power // 2 * 3 <= limit else power
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def padded_height(num_rows: int) -> int:
    """The lowest of the heights 1, 2, 3, 4, 6, 8, 12, ... that holds the rows, at least 1."""
    power = 1 << (num_rows - 1).bit_length()
    return max(power // 4 * 3, 1) if num_rows <= power // 4 * 3 else power


def joined(parts: Iterable[Columns], num_rows: int) -> Columns:
    """What all rows yield, [T, ...] by name, from tiles that follow one another.

    A tile's values are copied to their place at once. Kept as they are, the small tensors would
    come to lie where a tile had been, and the next tile, which no longer fits there, would take
    memory anew.

    Args:
        parts: of every tile, computed as it is asked for; the same names in each.
        num_rows: T.
    """
    whole: Columns = {}
    start = 0
    for part in parts:
        end = start + len(next(iter(part.values())))
        for name, values in part.items():
            if name not in whole:
                whole[name] = values.new_empty(num_rows, *values.shape[1:])
            whole[name][start:end] = values
        start = end
    return whole
