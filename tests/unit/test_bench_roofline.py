"""The roofline, counted by hand."""

import pytest

from vllm_edlm.bench.roofline import Rates, Work, forward_work, least_seconds
from vllm_edlm.bench.shapes import Shape

# Queries 4 x 2 = 8 wide, keys and values 2 x 2 = 4 wide each.
SHAPE = Shape(layers=3, hidden=5, intermediate=7, heads=4, kv_heads=2, head_dim=2, vocabulary=11)
# q 5x8, k 5x4, v 5x4, o 8x5; gate 5x7, up 5x7, down 7x5.
LAYER = 40 + 20 + 20 + 40 + 35 + 35 + 35
HEAD = 55


def test_one_row() -> None:
    work = forward_work(SHAPE, [1], [10], logits_rows=1)
    assert work.weight_bytes == 2 * (3 * LAYER + HEAD)
    # Three layers, keys and values, ten positions, two heads of two, two bytes each.
    assert work.kv_bytes == 3 * 2 * 10 * 4 * 2
    # A query of four heads meets ten keys of two entries, and ten values.
    attention = 3 * 4 * 10 * (2 * 2 + 2 * 2)
    assert work.flops == 2 * (3 * LAYER + HEAD) + attention


def test_weights_are_read_once_whatever_the_rows() -> None:
    one = forward_work(SHAPE, [1], [10], logits_rows=1)
    many = forward_work(SHAPE, [6, 2], [10, 30], logits_rows=5)
    assert many.weight_bytes == one.weight_bytes
    assert many.kv_bytes == 4 * one.kv_bytes
    pairs = 6 * 10 + 2 * 30
    assert many.flops == 2 * (8 * 3 * LAYER + 5 * HEAD) + 3 * 4 * pairs * 8


def test_no_logits_need_no_head() -> None:
    work = forward_work(SHAPE, [2], [2], logits_rows=0)
    assert work.weight_bytes == 2 * 3 * LAYER
    assert work.flops == 2 * 2 * 3 * LAYER + 3 * 4 * (2 * 2) * 8


def test_causal_rows_see_keys_up_to_their_own() -> None:
    whole = forward_work(SHAPE, [4], [4], logits_rows=0, causal=True)
    chunk = forward_work(SHAPE, [2], [4], logits_rows=0, causal=True)
    linear = 2 * 3 * LAYER
    assert whole.flops == 4 * linear + 3 * 4 * (1 + 2 + 3 + 4) * 8
    assert chunk.flops == 2 * linear + 3 * 4 * (3 + 4) * 8


def test_bytes_follow_the_dtype() -> None:
    half, full = (
        forward_work(Shape(dtype=dtype), [1], [10], logits_rows=1)
        for dtype in ("bfloat16", "float32")
    )
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.kv_bytes == 2 * half.kv_bytes
    assert full.flops == half.flops


def test_every_sequence_needs_its_rows() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        forward_work(SHAPE, [1], [10, 10], logits_rows=1)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [(Work(300, 100, 10), 4.0), (Work(300, 100, 5000), 5.0)],
)
def test_least_seconds_are_those_of_the_slower_side(work: Work, seconds: float) -> None:
    assert least_seconds(work, Rates(100.0, 1000.0, "bfloat16")) == seconds
