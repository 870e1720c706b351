"""The canvas: choice of tokens, emission of the known run, and what is masked again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_edlm import canvas as canvas_module
from vllm_edlm.canvas import choose_tokens, emitted_run, open_canvas

MASK = 9


def test_choose_tokens_never_takes_the_mask_but_counts_it() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 5.0], [2.0, 0.0, 0.0, 0.0]])
    token, confidence = choose_tokens(logits, mask_token_id=3)
    assert token.tolist() == [1, 0], "the lowest id on ties, and never the mask token"
    assert torch.allclose(confidence, logits.softmax(dim=1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("rows_per_tile", [1, 3, 100])
def test_choose_tokens_in_tiles(monkeypatch: pytest.MonkeyPatch, rows_per_tile: int) -> None:
    logits = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    whole = choose_tokens(logits, MASK)
    monkeypatch.setattr(canvas_module, "TILE_BYTES", rows_per_tile * 4 * 50)
    tiled = choose_tokens(logits, MASK)
    assert torch.equal(tiled[0], whole[0])
    assert torch.allclose(tiled[1], whole[1])
    assert torch.equal(logits, before), "the logits belong to the runner"


def test_choose_tokens_in_bf16_is_the_fp32_choice_of_the_same_logits() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    token, confidence = choose_tokens(logits, MASK)
    wide_token, wide_confidence = choose_tokens(logits.float(), MASK)
    assert torch.equal(token, wide_token)
    assert torch.equal(confidence, wide_confidence)


entry = st.sampled_from([1, 2, MASK])
rows = st.tuples(
    st.lists(entry, min_size=6, max_size=6), st.integers(0, 6), st.integers(0, 6), st.booleans()
)


@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_emitted_run(batch: list[tuple[list[int], int, int, bool]]) -> None:
    canvas = torch.tensor([row[0] for row in batch])
    offset = torch.tensor([min(row[1], row[2]) for row in batch])
    width = torch.tensor([max(row[1], row[2]) for row in batch])
    tokens, count = emitted_run(canvas, offset, width, MASK)
    for i, (row, start, end) in enumerate(
        zip(canvas.tolist(), offset.tolist(), width.tolist(), strict=True)
    ):
        run = row[start:end]
        run = run[: run.index(MASK)] if MASK in run else run
        assert tokens[i, : count[i]].tolist() == run


@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_open_canvas(batch: list[tuple[list[int], int, int, bool]]) -> None:
    canvas = torch.tensor([row[0] for row in batch])
    offset = torch.tensor([row[1] for row in batch])
    is_new = torch.tensor([row[3] for row in batch])
    opened = open_canvas(canvas, offset, is_new, MASK).tolist()
    for before, after, start, new in zip(
        canvas.tolist(), opened, offset.tolist(), is_new.tolist(), strict=True
    ):
        # An emitted run that was not accepted starts at `start` and ends at the first mask.
        end = before.index(MASK, start) if MASK in before[start:] else len(before)
        kept = [MASK if start <= i < end else token for i, token in enumerate(before)]
        assert after[start:] == ([MASK] * len(after) if new else kept)[start:]
