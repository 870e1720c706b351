"""Bad words on a canvas, against the sentence of the semantics place by place."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_edlm import bad_words as bad_words_module
from vllm_edlm.bad_words import BadWords, BannedTokens, WordIndex

MASK = 4
VOCABULARY_SIZE = 5
BLOCK_LENGTH = 5
MAX_MODEL_LEN = 12
CPU = torch.device("cpu")


@dataclass
class Case:
    """One request: `text` holds known tokens up to `start` + `offset`, then the open block."""

    text: list[int | None]
    start: int = 0
    offset: int = 0
    words: list[list[int]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return len(self.text) - self.start

    def canvas(self) -> list[int]:
        """B entries, those that have no meaning set to a token that is in every word."""
        entries = [MASK if token is None else token for token in self.text[self.start :]]
        entries[: self.offset] = [0] * self.offset
        return entries + [0] * (BLOCK_LENGTH - len(entries))

    def row(self) -> list[int]:
        """max_model_len token ids, of which the known ones count."""
        known = [t for t in self.text[: self.start + self.offset] if t is not None]
        return known + [0] * (MAX_MODEL_LEN - len(known))


def places(case: Case) -> Iterable[tuple[list[int], range]]:
    """Every word and every range of positions that it may stand at."""
    for word in case.words:
        for begin in range(len(case.text) - len(word) + 1):
            yield word, range(begin, begin + len(word))


def expected_bans(case: Case) -> set[tuple[int, int]]:
    """Pairs of a canvas entry and a token."""
    bans = set()
    for word, place in places(case):
        held = [case.text[position] for position in place]
        masked = [i for i, token in enumerate(held) if token is None]
        if len(masked) == 1:
            (i,) = masked
            if held[:i] + held[i + 1 :] == word[:i] + word[i + 1 :]:
                bans.add((place[i] - case.start, word[i]))
    return bans


def standing(case: Case) -> set[tuple[tuple[int, ...], int]]:
    """Words and where each stands completely."""
    return {
        (tuple(word), place.start)
        for word, place in places(case)
        if [case.text[position] for position in place] == word
    }


def index_of(cases: list[Case]) -> WordIndex:
    # Slots in another order than the batch, and some that are empty.
    slots = slots_of(cases)
    bad_words = BadWords(2 * len(cases), CPU)
    for slot, case in zip(slots, cases, strict=True):
        bad_words.add(int(slot), case.words)
    assert bad_words.any(slots)
    return bad_words.index(slots)


def slots_of(cases: list[Case]) -> np.ndarray:
    return np.arange(len(cases))[::-1] * 2


def window_of(index: WordIndex, cases: list[Case]) -> Tensor:
    all_token_ids = torch.zeros(2 * len(cases), MAX_MODEL_LEN, dtype=torch.int32)
    slots = torch.from_numpy(slots_of(cases).copy())
    all_token_ids[slots] = torch.tensor([case.row() for case in cases], dtype=torch.int32)
    return index.window(
        all_token_ids,
        slots,
        torch.tensor([case.start for case in cases]),
        torch.tensor([case.offset for case in cases]),
        torch.tensor([case.width for case in cases]),
        torch.tensor([case.canvas() for case in cases]),
        MASK,
    )


def open_cells(cases: list[Case]) -> list[int]:
    """Rows of logits come for revealed positions of the open part, too."""
    return [
        request * BLOCK_LENGTH + entry
        for request, case in enumerate(cases)
        for entry in range(case.offset, case.width)
    ]


def got_bans(banned: BannedTokens, cases: list[Case], rows_at_once: int) -> list[set]:
    cells = open_cells(cases)
    tiles = [cells[i : i + rows_at_once] for i in range(0, len(cells), rows_at_once)]
    bans: list[set] = [set() for _ in cases]
    for tile in tiles:
        logits = torch.randn(len(tile), VOCABULARY_SIZE)
        before = logits.clone()
        banned.apply_(logits, torch.tensor(tile))
        kept = logits != -math.inf
        assert torch.equal(logits[kept], before[kept]), "other logits stay as they are"
        for row, token in (~kept).nonzero().tolist():
            request, entry = divmod(tile[row], BLOCK_LENGTH)
            bans[request].add((entry, token))
    return bans


def assert_bans(*cases: Case, rows_at_once: int = 100) -> None:
    index = index_of(list(cases))
    banned = index.banned(window_of(index, list(cases)))
    got = got_bans(banned, list(cases), rows_at_once)
    assert got == [expected_bans(case) for case in cases]


tokens = st.integers(0, 2)
word_lists = st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> Case:
    start = draw(st.integers(0, MAX_MODEL_LEN - BLOCK_LENGTH))
    width = draw(st.integers(1, BLOCK_LENGTH))
    offset = draw(st.integers(0, width))
    # The mask token may well occur in a prompt; there it is a token like others.
    known = draw(st.lists(tokens | st.just(MASK), min_size=start + offset, max_size=start + offset))
    rest = draw(st.lists(st.none() | tokens, min_size=width - offset, max_size=width - offset))
    words = draw(word_lists)
    return Case([*known, *rest], start, offset, words)


batches = st.lists(requests(), min_size=1, max_size=4).filter(
    lambda cases: any(case.words for case in cases)
)


@given(cases=batches, rows_at_once=st.sampled_from([1, 3, 100]))
def test_bans(cases: list[Case], rows_at_once: int) -> None:
    assert_bans(*cases, rows_at_once=rows_at_once)


@given(cases=batches, data=st.data())
def test_completes(cases: list[Case], data: st.DataObject) -> None:
    revealed = [
        Case(
            [data.draw(st.none() | tokens) if token is None else token for token in case.text],
            case.start,
            case.offset,
            case.words,
        )
        for case in cases
    ]
    index = index_of(cases)
    got = index.completes(window_of(index, cases), window_of(index, revealed))
    assert got.tolist() == [
        bool(standing(after) - standing(before))
        for before, after in zip(cases, revealed, strict=True)
    ]


@given(cases=batches)
def test_the_surest_single_token_that_is_not_banned_completes_nothing(cases: list[Case]) -> None:
    """What the fall-back to a single reveal relies on."""
    index = index_of(cases)
    window = window_of(index, cases)
    bans = got_bans(index.banned(window), cases, rows_at_once=100)
    for request, case in enumerate(cases):
        open_positions = [p for p, token in enumerate(case.text) if token is None]
        for position, token in itertools.product(open_positions, range(3)):
            text = [*case.text]
            text[position] = token
            after = [*cases]
            after[request] = Case(text, case.start, case.offset, case.words)
            is_banned = (position - case.start, token) in bans[request]
            completes = index.completes(window, window_of(index, after))
            assert completes[request].item() == is_banned


def test_word_that_begins_before_the_block() -> None:
    case = Case([9, 1, 2, None, None], start=3, words=[[1, 2, 3]])
    assert expected_bans(case) == {(0, 3)}
    assert_bans(case)


def test_word_that_begins_in_the_known_part_of_the_block() -> None:
    case = Case([1, 2, 1, None, 2], start=1, offset=2, words=[[2, 1, 1], [0, 0, 2], [1, 1, 2]])
    assert expected_bans(case) == {(2, 1)}
    assert_bans(case)


def test_word_whose_last_token_is_revealed_first() -> None:
    case = Case([None, None, 3, None], words=[[1, 2, 3]])
    assert expected_bans(case) == set(), "two positions are still open"
    assert_bans(case)
    case = Case([None, 2, 3, None], words=[[1, 2, 3]])
    assert expected_bans(case) == {(0, 1)}
    assert_bans(case)


def test_words_that_share_tokens() -> None:
    case = Case([1, None, 3, None], words=[[1, 2], [2, 3], [1, 0, 3], [3, 3], [2]])
    assert expected_bans(case) == {(1, 2), (1, 0), (1, 3), (3, 3), (3, 2)}
    assert_bans(case)


def test_word_longer_than_the_block() -> None:
    word = [1, 2, 3, 1, 2, 3, 1, 2]
    case = Case([*word[:3], None, *word[4:]], start=3, words=[word])
    assert expected_bans(case) == {(0, 1)}
    assert_bans(case)
    assert_bans(Case(case.text, start=3, words=[[0, *word]]), Case([None], words=[[0] * 40]))


def test_word_of_which_nothing_is_known() -> None:
    case = Case([None] * BLOCK_LENGTH, words=[[0, 1, 2, 0, 1]])
    assert expected_bans(case) == set()
    assert_bans(case)


def test_word_that_would_end_behind_the_block_bans_nothing() -> None:
    case = Case([None, None, 1], words=[[1, 0]])
    assert expected_bans(case) == set()
    assert_bans(case)


def test_word_of_the_mask_token_itself() -> None:
    # A masked position does not hold the mask token; only a prompt may.
    assert_bans(Case([MASK, None, None], start=1, words=[[MASK, 2], [MASK]]))


def test_first_position_that_counts() -> None:
    case = Case([1, 1, None], start=2, words=[[1, 2], [1, 1, 3]])
    index = index_of([case])
    arguments = (
        torch.tensor([case.row()]),
        torch.tensor([0]),
        *(torch.tensor([n]) for n in (case.start, case.offset, case.width)),
        torch.tensor([case.canvas()]),
        MASK,
    )
    for first, bans in [(0, {(0, 2), (0, 3)}), (1, {(0, 2)}), (2, set())]:
        window = index.window(*arguments, first_N=torch.tensor([first]))
        assert got_bans(index.banned(window), [case], 1) == [bans]


@pytest.mark.parametrize("pairs", [1, 7, 16])
def test_work_in_parts(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(bad_words_module, "MAX_PAIRS", pairs)
    assert_bans(
        Case([1, 2, None, 1, None, 3], start=1, words=[[1, 2], [1, 2, 1], [2, 1, 0, 3]]),
        Case([None, None, 2, None], words=[[0], [2, 2]]),
    )


def test_bf16_logits() -> None:
    case = Case([1, None], words=[[1, 2]])
    index = index_of([case])
    logits = torch.ones(1, VOCABULARY_SIZE, dtype=torch.bfloat16)
    index.banned(window_of(index, [case])).apply_(logits, torch.tensor([1]))
    assert logits.tolist() == [[1, 1, -math.inf, 1, 1]]


def test_word_with_a_token_that_has_no_logit() -> None:
    case = Case([None, None], words=[[VOCABULARY_SIZE], [VOCABULARY_SIZE + 7], [1]])
    index = index_of([case])
    bans = got_bans(index.banned(window_of(index, [case])), [case], rows_at_once=1)
    assert bans == [{(0, 1), (1, 1)}]


def test_tensors_are_kept_until_the_batch_or_its_words_change() -> None:
    bad_words = BadWords(4, CPU)
    assert not bad_words.any(np.arange(4))
    bad_words.add(1, [[1, 2]])
    assert bad_words.any(np.array([0, 1]))
    assert not bad_words.any(np.array([0, 2]))
    slots = np.array([0, 1])
    index = bad_words.index(slots)
    bad_words.add(3, None)
    assert bad_words.index(slots) is index
    assert bad_words.index(np.array([1, 0])).request.tolist() == [0]
    assert bad_words.index(slots).request.tolist() == [1]
    bad_words.add(0, [[3]])
    assert bad_words.index(slots).token.tolist() == [3, 1, 2]
    bad_words.add(1, None)
    assert bad_words.index(slots).token.tolist() == [3], "a slot's next request has its own words"
    bad_words.add(0, [])
    assert not bad_words.any(slots)


def test_shapes_never_depend_on_device_data() -> None:
    """Meta tensors hold no data, so whatever would have to read some of it fails."""
    case = Case([1, None, 3, None], words=[[1, 2], [0, 1, 2, 3]])
    on_cpu = index_of([case])
    tensors = {
        name: getattr(on_cpu, name).to("meta")
        for name in ("token", "back", "word", "last", "request")
    }
    index = WordIndex(**tensors, num_requests=1, context=on_cpu.context)
    number = torch.zeros(1, dtype=torch.int64, device="meta")
    canvas = torch.zeros(1, BLOCK_LENGTH, dtype=torch.int64, device="meta")
    all_token_ids = torch.zeros(1, MAX_MODEL_LEN, dtype=torch.int32, device="meta")
    window = index.window(all_token_ids, number, number, number, number, canvas, MASK)
    logits = torch.zeros(2, VOCABULARY_SIZE, device="meta")
    index.banned(window).apply_(logits, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert index.completes(window, window).shape == (1,)
