"""Tiles of logits: all rows once, bounded, of few heights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.tiles import TILE_BYTES, padded_height, tiles


def test_heights() -> None:
    heights = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert sorted({padded_height(rows) for rows in range(1, 129)}) == heights
    assert all(
        padded_height(rows) == min(h for h in heights if h >= rows) for rows in range(1, 129)
    )


@pytest.mark.parametrize(("vocab_size", "height"), [(151_936, 48), (32_000, 256), (10**9, 1)])
def test_the_highest_tile(vocab_size: int, height: int) -> None:
    assert [tile.stop - tile.start for tile in tiles(2 * height + 1, vocab_size)] == [
        height,
        height,
        1,
    ]


@given(num_rows=st.integers(0, 3000), vocab_size=st.integers(1, 10**7))
def test_all_rows_once_and_bounded(num_rows: int, vocab_size: int) -> None:
    slices = list(tiles(num_rows, vocab_size))
    assert [row for tile in slices for row in range(tile.start, tile.stop)] == list(range(num_rows))
    for tile in slices:
        height = padded_height(tile.stop - tile.start)
        assert height == 1 or 4 * vocab_size * height <= TILE_BYTES
