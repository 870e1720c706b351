"""Rows: every token once, whole blocks, nothing across rows; the same rows whoever reads them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from vllm_edlm.train.documents import Document
from vllm_edlm.train.packing import NO_DOCUMENT, PackedRows, cut, pack, shuffled

EOS = 1
Row = dict[str, Tensor]


def document(prompt: int, answer: int, first: int = 10) -> Document:
    """A document whose tokens count up from `first`."""
    tokens = list(range(first, first + prompt + answer))
    return Document(tokens, [False] * prompt + [True] * answer, f"data.jsonl, line {first}")


def numbered(lengths: list[tuple[int, int]]) -> list[Document]:
    """Documents of (prompt, answer) tokens; no token occurs twice."""
    starts = [10 + sum(p + a for p, a in lengths[:i]) for i in range(len(lengths))]
    return [document(p, a, first) for (p, a), first in zip(lengths, starts, strict=True)]


def take(rows: PackedRows, count: int) -> list[Row]:
    return list(islice(rows, count))


def one_pass(documents: list[Document], *args: int, **options: int) -> list[Row]:
    """The rows of the first pass: those before the data is asked for a second time."""
    passes = 0

    class Once(list[Document]):
        def __iter__(self) -> Iterator[Document]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    rows = []
    for row in PackedRows(Once(documents), *args, EOS, **options):
        if passes > 1:
            return rows
        rows.append(row)
    raise AssertionError("rows never end")


def segments(row: Row) -> list[list[tuple[int, bool, int]]]:
    """The row's documents as (token, in loss, position)."""
    names = ("document_ids", "tokens", "in_loss", "position_ids")
    columns = zip(*(row[name].tolist() for name in names), strict=True)
    by_document = groupby(columns, key=lambda column: column[0])
    return [[rest for _, *rest in group] for number, group in by_document if number != NO_DOCUMENT]


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Document], int, int]:
    """Documents, row length and block length; text may be longer than a row, chats never are."""
    block_length = draw(st.integers(1, 5))
    row_length = block_length * draw(st.integers(1, 6))
    text = st.tuples(st.just(0), st.integers(1, 3 * row_length))
    chat = st.integers(1, row_length).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(0, row_length - length))
    )
    lengths = draw(st.lists(st.one_of(text, chat), min_size=1, max_size=60))
    return numbered(lengths), row_length, block_length


@given(packings(), st.integers(0, 10))
def test_every_token_of_every_document_stands_in_one_row(
    packing: tuple[list[Document], int, int], buffer: int
) -> None:
    documents, row_length, block_length = packing
    rows = one_pass(documents, row_length, block_length, shuffle_buffer=buffer)
    found = [segment for row in rows for segment in segments(row)]
    kept = sorted(
        (token, in_loss) for segment in found for token, in_loss, _ in segment if token != EOS
    )
    assert kept == [pair for d in documents for pair in zip(d.tokens, d.in_loss, strict=True)]
    for segment in found:
        tokens = [token for token, _, _ in segment if token != EOS]
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens))), "a piece is one stretch"
        assert [position for _, _, position in segment] == list(range(len(segment)))
        assert len(segment) % block_length == 0
        assert 0 <= len(segment) - len(tokens) < block_length
        assert all(token == EOS and in_loss for token, in_loss, _ in segment[len(tokens) :])


@given(packings())
def test_rows_are_full_length_and_their_pad_is_not_in_the_loss(
    packing: tuple[list[Document], int, int],
) -> None:
    documents, row_length, block_length = packing
    for number, row in enumerate(one_pass(documents, row_length, block_length)):
        assert row["sample"].item() == number
        assert all(row[name].shape == (row_length,) for name in row if name != "sample")
        assert row["in_loss"].dtype == torch.bool
        pad = row["document_ids"] == NO_DOCUMENT
        assert not row["in_loss"][pad].any()
        assert (row["tokens"][pad] == EOS).all()
        assert not pad[: int((~pad).sum())].any(), "the pad is the row's end"


@given(packings())
def test_pieces_of_a_long_text_are_cut_at_rows_and_stay_in_order(
    packing: tuple[list[Document], int, int],
) -> None:
    documents, row_length, block_length = packing
    rows = one_pass(documents, row_length, block_length)
    firsts = [segment[0][0] for row in rows for segment in segments(row)]
    for d in documents:
        starts = d.tokens[::row_length]
        assert [first for first in firsts if first in d.tokens] == starts


@given(packings(), st.integers(0, 10), st.integers(0, 3), st.integers(0, 30))
def test_whoever_skips_rows_goes_on_with_the_same_rows(
    packing: tuple[list[Document], int, int], buffer: int, seed: int, skipped: int
) -> None:
    documents, row_length, block_length = packing
    rows = PackedRows(documents, row_length, block_length, EOS, buffer, seed)
    whole = take(rows, skipped + 5)
    again = PackedRows(documents, row_length, block_length, EOS, buffer, seed)
    rest = list(islice(again, skipped, skipped + 5))
    for expected, row in zip(whole[skipped:], rest, strict=True):
        assert all(torch.equal(expected[name], row[name]) for name in expected)


def test_a_document_goes_where_it_fits_first() -> None:
    lengths = [15, 10, 5, 20]
    rows = list(pack(numbered([(0, length) for length in lengths]), 20))
    packed = [[len(d.tokens) for d in row] for row in rows]
    # 5 fills the row of 15, although a later row is open; full rows leave at once.
    assert packed == [[15, 5], [20], [10]]


def test_packing_wastes_little() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(2000)]
    rows = sum(1 for _ in pack(numbered([(0, length) for length in lengths]), 100))
    # In order, without a look-ahead, a quarter of such rows would be pad.
    assert rows < 1.08 * sum(lengths) / 100


def test_a_row_waits_for_few_documents_only() -> None:
    asked = 0

    def endless() -> Iterator[Document]:
        nonlocal asked
        while True:
            asked += 1
            yield document(0, 60)

    next(pack(endless(), 100))
    assert asked < 50


def test_the_shuffle_draws_from_its_buffer() -> None:
    documents = numbered([(0, 1)] * 100)
    order = [d.tokens[0] - 10 for d in shuffled(documents, 10, random.Random(0))]
    assert sorted(order) == list(range(100))
    assert order != list(range(100))
    assert all(index <= place + 10 for place, index in enumerate(order)), "read ahead by ten only"
    assert list(shuffled(documents, 200, random.Random(0))) != documents


def first_tokens(rows: PackedRows, count: int) -> list[int]:
    return [int(row["tokens"][0]) for row in take(rows, count)]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    documents = numbered([(0, 4)] * 30)
    drawn = first_tokens(PackedRows(documents, 4, 4, EOS, 10, seed=0), 60)
    first, second = drawn[:30], drawn[30:]
    assert sorted(first) == sorted(second) == [d.tokens[0] for d in documents]
    assert first != second
    assert first_tokens(PackedRows(documents, 4, 4, EOS, 10, seed=1), 30) != first


def test_sample_counts_on_over_all_passes() -> None:
    rows = take(PackedRows(numbered([(0, 4)] * 3), 4, 4, EOS), 8)
    assert [row["sample"].item() for row in rows] == list(range(8))
    tokens = [int(row["tokens"][0]) for row in rows]
    assert tokens == [10, 14, 18, 10, 14, 18, 10, 14]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_rows(workers: int) -> None:
    documents = numbered([(0, 4)] * 7)
    rows = PackedRows(documents, 4, 4, EOS, shuffle_buffer=3)
    loader = DataLoader(rows, batch_size=2, num_workers=workers)
    batches = list(islice(loader, 6))
    read = {int(s): t for b in batches for s, t in zip(b["sample"], b["tokens"], strict=True)}
    assert sorted(read) == list(range(12))
    for row in take(rows, 12):
        assert torch.equal(read[int(row["sample"])], row["tokens"])


def test_a_chat_longer_than_a_row_is_named() -> None:
    rows = PackedRows([document(2, 2), document(9, 9, first=30)], 16, 4, EOS)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 30: .* 20 tokens; a row holds 16"):
        take(rows, 5)


def test_chats_longer_than_a_row_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    documents = [document(9, 9, first=30), document(2, 2), document(1, 40, first=60)]
    rows = take(PackedRows(documents, 16, 4, EOS, skip_long=True), 2)
    assert [row["tokens"].tolist()[:4] for row in rows] == [[10, 11, 12, 13]] * 2
    assert "left out 2 documents" in caplog.text


def test_a_document_of_exactly_a_row_is_whole() -> None:
    whole = document(3, 13)
    assert cut(whole, 16) == [whole]


@pytest.mark.parametrize("skip_long", [False, True])
def test_a_pass_without_rows_is_an_error_not_a_loop(skip_long: bool) -> None:
    once = iter([document(2, 2)])
    with pytest.raises(ValueError, match="no row"):
        take(PackedRows(once, 16, 4, EOS, skip_long=skip_long), 2)


def test_a_source_with_long_chats_alone_gives_no_row() -> None:
    with pytest.raises(ValueError, match="no row"):
        take(PackedRows([document(9, 9)], 16, 4, EOS, skip_long=True), 1)


@pytest.mark.parametrize(
    ("row_length", "block_length", "buffer", "message"),
    [
        (10, 4, 0, "row length 10 is not a multiple of the block length 4"),
        (0, 4, 0, "row length 0"),
        (16, 0, 0, "block length must be at least 1, got 0"),
        (16, -1, 0, "block length must be at least 1, got -1"),
        (16, 4, -1, "shuffle buffer must be at least 0, got -1"),
    ],
)
def test_bad_lengths(row_length: int, block_length: int, buffer: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedRows([document(1, 1)], row_length, block_length, EOS, buffer)
