"""Joint sequences: what stands where, what predicts it, and on what corruption depends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.joint_examples import (
    MASK,
    B,
    L,
    example_rows,
    joint,
    objective,
    stacked,
)
from vllm_edlm.train.joint import IGNORED, JointCollator
from vllm_edlm.train.masks import CLEAN, Pattern
from vllm_edlm.train.objective import Objective

OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"noise": "uniform"},
    {"noise_copies": 3},
    {"token_shift": True, "noise_copies": 2},
    {"ar_loss_weight": 0.5},
    {"distillation_weight": 0.5},
    {"pattern": Pattern.block_noisy},
    {"pattern": Pattern.bidirectional, "token_shift": True},
]


def masked_places(batch: dict[str, Tensor], row: int) -> dict[tuple[int, int, int], float]:
    """(copy, document, position) of a row's masked tokens, with their masking ratios."""
    fields = [batch[name][row].tolist() for name in ("copy", "document", "position_ids", "p_mask")]
    asked = (batch["labels"][row] != IGNORED).tolist()
    places = zip(*fields, strict=True)
    return {place[:3]: place[3] for place, wanted in zip(places, asked, strict=True) if wanted}


def place_of(batch: dict[str, Tensor], row: int, index: int) -> tuple[int, int, int]:
    names = ("copy", "document", "position_ids")
    copy, document, position = (int(batch[name][row, index]) for name in names)
    return copy, document, position


def test_targets_are_not_shifted() -> None:
    rows = stacked(example_rows())
    batch = joint(objective(), drop_unused=False)
    noisy, clean = slice(0, L), slice(L, 2 * L)
    masked = batch["labels"] != IGNORED
    assert masked.any(dim=1).all()
    assert torch.equal(batch["labels"][masked], rows["tokens"][masked[:, noisy]])
    assert (batch["tokens"][masked] == MASK).all()
    assert torch.equal(
        batch["tokens"][:, noisy][~masked[:, noisy]], rows["tokens"][~masked[:, noisy]]
    )
    assert torch.equal(batch["tokens"][:, clean], rows["tokens"])
    assert not masked[:, clean].any(), "no loss on the clean half"
    assert not (masked[:, noisy] & ~rows["in_loss"]).any()
    assert torch.equal(batch["source"], torch.arange(2 * L).expand(2, -1))


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_a_batch_is_flat_and_its_rows_can_be_divided(changes: dict[str, Any]) -> None:
    batch = joint(objective(**changes))
    assert {tuple(tensor.shape) for tensor in batch.values()} == {tuple(batch["tokens"].shape)}


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_corruption_depends_on_the_sample_alone(changes: dict[str, Any]) -> None:
    rows = example_rows(6)
    collate = JointCollator(objective(**changes), steps=10, rows_per_step=6)
    together = collate(rows)
    for number, row in enumerate(rows):
        assert masked_places(collate([row]), 0) == masked_places(together, number)
    assert masked_places(together, 0) != masked_places(together, 2), "same row, next pass"


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_are_masked_independently(copies: int) -> None:
    batch = joint(objective(noise_copies=copies))
    one = masked_places(joint(objective()), 0)
    several = masked_places(batch, 0)
    by_copy = [{place[1:] for place in several if place[0] == 1 + c} for c in range(copies)]
    assert by_copy[0] == {place[1:] for place in one}
    assert len({frozenset(places) for places in by_copy}) == copies


def test_uniform_noise_has_one_ratio_per_document() -> None:
    batch = joint(objective(noise="uniform"), drop_unused=False)
    noisy, document = batch["p_mask"][0, :L], batch["document"][0, :L]
    ratios = [noisy[document == number].unique().tolist() for number in (0, 1)]
    assert [len(values) for values in ratios] == [1, 1]
    assert ratios[0] != ratios[1]


def test_growth_changes_the_block_length_at_its_sample() -> None:
    rows = example_rows(12)
    collate = JointCollator(objective(growth=(1, 2, 4)), steps=6, rows_per_step=2)
    for step, length in enumerate((1, 1, 2, 2, 4, 4)):
        batch = collate(rows[2 * step : 2 * step + 2])
        assert torch.equal(batch["block"], batch["position_ids"] // length), step


def test_accumulated_batches_of_one_step_have_the_same_block_length() -> None:
    rows = example_rows(8)
    collate = JointCollator(objective(growth=(2, 4)), steps=2, rows_per_step=4)
    lengths = []
    for start in range(0, 8, 2):
        batch = collate(rows[start : start + 2])
        lengths.append(int((batch["position_ids"][batch["block"] == 0]).max()) + 1)
    assert lengths == [2, 2, 4, 4]


@pytest.mark.parametrize("drop_unused", [False, True])
@pytest.mark.parametrize("copies", [1, 2])
def test_token_shift_reads_the_position_before(copies: int, drop_unused: bool) -> None:
    """Inside a block of the same copy; at a block's start the clean one, as committed."""
    batch = joint(objective(token_shift=True, noise_copies=copies), drop_unused)
    first_of_a_block = 0
    for row, index in (batch["labels"] != IGNORED).nonzero().tolist():
        copy, document, position = place_of(batch, row, index)
        assert position > 0, "nothing predicts a document's first token"
        expected = CLEAN if position % B == 0 else copy
        first_of_a_block += position % B == 0
        source = int(batch["source"][row, index])
        assert place_of(batch, row, source) == (expected, document, position - 1)
    assert first_of_a_block


@pytest.mark.parametrize("pattern", [Pattern.block_noisy, Pattern.bidirectional])
def test_without_a_clean_half_shift_stays_in_the_copy(pattern: Pattern) -> None:
    batch = joint(objective(pattern=pattern, token_shift=True, noise_copies=2))
    assert (batch["copy"] != CLEAN).all()
    for row, index in (batch["labels"] != IGNORED).nonzero().tolist():
        copy, document, position = place_of(batch, row, index)
        source = int(batch["source"][row, index])
        assert place_of(batch, row, source) == (copy, document, position - 1)


def test_next_labels_are_the_tokens_in_the_loss_that_follow_a_clean_one() -> None:
    rows = stacked(example_rows())
    batch = joint(objective(ar_loss_weight=1.0))
    expected = {
        (row, int(rows["document_ids"][row, c]), int(rows["position_ids"][row, c]) - 1): int(
            rows["tokens"][row, c]
        )
        for row, c in rows["in_loss"].nonzero().tolist()
        if rows["position_ids"][row, c] > 0
    }
    found = {}
    for row, index in (batch["next_labels"] != IGNORED).nonzero().tolist():
        copy, document, position = place_of(batch, row, index)
        assert copy == CLEAN
        found[row, document, position] = int(batch["next_labels"][row, index])
    assert found == expected


def test_unused_blocks_are_left_out() -> None:
    """Noisy blocks without a token in the loss, and clean blocks that nothing attends to."""
    for chosen, whole in ((objective(), False), (objective(distillation_weight=0.5), True)):
        row = joint(chosen, rows=example_rows()[:1])
        places = {place_of(row, 0, index) for index in range(row["tokens"].shape[1])}
        assert {place for place in places if place[0] == 1} == {
            (1, document, position)
            # The prompts, of 6 and 3 tokens, fill one block and none.
            for document, length, first in ((0, 16, 4), (1, 8, 0))
            for position in range(first, length)
        }
        kept = {place[1:] for place in places if place[0] == CLEAN}
        last = 0 if whole else B
        assert kept == {
            (document, position)
            for document, length in ((0, 16), (1, 8))
            for position in range(length - last)
        }


def test_patterns_without_a_clean_half_keep_whole_documents() -> None:
    chosen: Objective = objective(pattern=Pattern.bidirectional)
    batch = joint(chosen, rows=example_rows()[1:2])
    assert batch["tokens"].shape[1] == 20, "all but the pad"
