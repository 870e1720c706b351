"""Tiles of logits: all rows once, bounded, of few heights."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm.tiles import TILE_BYTES, joined, padded_height, tiles


def test_heights() -> None:
    heights = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert sorted({padded_height(rows) for rows in range(1, 129)}) == heights
    assert all(
        padded_height(rows) == min(h for h in heights if h >= rows) for rows in range(1, 129)
    )


@pytest.mark.parametrize(("vocab_size", "height"), [(151_936, 48), (32_000, 256), (10**9, 1)])
def test_the_highest_tile(vocab_size: int, height: int) -> None:
    for row_bytes, on_gpu in ((4 * vocab_size, False), (8 * vocab_size, True)):
        slices = tiles(2 * height + 1, row_bytes, on_gpu=on_gpu)
        assert [tile.stop - tile.start for tile in slices] == [height, height, 1]


@given(num_rows=st.integers(0, 3000), vocab_size=st.integers(1, 10**7))
def test_all_rows_once_and_bounded(num_rows: int, vocab_size: int) -> None:
    slices = list(tiles(num_rows, 4 * vocab_size))
    assert [row for tile in slices for row in range(tile.start, tile.stop)] == list(range(num_rows))
    for tile in slices:
        height = padded_height(tile.stop - tile.start)
        assert height == 1 or 4 * vocab_size * height <= TILE_BYTES


def test_what_tiles_yield_is_joined_row_by_row() -> None:
    rows = {"token": torch.arange(7), "logprobs": torch.rand(7, 3)}
    slices = [slice(0, 3), slice(3, 6), slice(6, 7)]
    whole = joined(({name: rows[name][part] for name in rows} for part in slices), 7)
    assert whole.keys() == rows.keys()
    assert all(torch.equal(whole[name], rows[name]) for name in rows)


def test_no_tile_outlives_its_values() -> None:
    """Else the tensors of all tiles would be held at once."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(5):
            # The part before this one may still be looked at, none before that.
            assert sum(part() is not None for part in alive) <= 1
            values = torch.full((1,), start)
            alive.append(weakref.ref(values))
            yield {"token": values}
            del values

    assert joined(parts(), 5)["token"].tolist() == list(range(5))
