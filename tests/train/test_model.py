"""One forward over [x_t | x_0] equals denoising every block against a cache of clean blocks."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.train.joint_examples import B, L, example_rows, joint, objective, stacked
from tests.train.tiny_families import FAMILIES, tiny_model
from vllm_edlm.train.attention import implementation
from vllm_edlm.train.joint import IGNORED
from vllm_edlm.train.loss import masked_loss
from vllm_edlm.train.masks import Pattern
from vllm_edlm.train.model import BlockDiffusionLM, TokenLosses
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.teacher import Teacher


@pytest.fixture(params=FAMILIES)
def family_lm(request: pytest.FixtureRequest) -> Any:
    return tiny_model(
        request.param,
        vocab_size=200,
        attn_implementation=implementation("sdpa", torch.device("cpu")),
    )


class Served(NamedTuple):
    """Hidden states [tokens, hidden] of a document's noisy blocks and of their commits."""

    denoised: Tensor
    committed: Tensor


@torch.no_grad()
def served(lm: Any, clean: Tensor, noisy: Tensor) -> Served:
    """One document block by block against a cache of the clean blocks before."""
    cache = DynamicCache(config=lm.config)
    parts: list[list[Tensor]] = [[], []]
    for start in range(0, len(clean), B):
        denoise, commit = (noisy, copy.deepcopy(cache)), (clean, cache)
        for part, (tokens, past) in zip(parts, (denoise, commit), strict=True):
            output = lm.model(
                input_ids=tokens[None, start : start + B],
                attention_mask=torch.ones(1, 1, B, start + B, dtype=torch.bool),
                position_ids=torch.arange(start, start + B)[None],
                past_key_values=past,
                use_cache=True,
            )
            part.append(output.last_hidden_state[0])
    return Served(*(torch.cat(part) for part in parts))


@pytest.mark.parametrize("token_shift", [False, True])
def test_one_pass_equals_cached_passes(family_lm: Any, token_shift: bool) -> None:
    chosen = objective(token_shift=token_shift)
    rows, batch = stacked(example_rows()), joint(chosen, drop_unused=False)
    with torch.no_grad():
        hidden = BlockDiffusionLM(family_lm, chosen).hidden_states(batch)
    for row in range(2):
        predicts = hidden[row, batch["source"][row, :L]]
        for document in rows["document_ids"][row].unique().tolist():
            here = rows["document_ids"][row] == document
            clean, noisy = rows["tokens"][row][here], batch["tokens"][row, :L][here]
            expected = served(family_lm, clean, noisy)
            found, wanted = predicts[here], expected.denoised
            if token_shift:
                starts = torch.arange(len(clean)) % B == 0
                before = torch.where(starts[:, None], *(x.roll(1, 0) for x in reversed(expected)))
                found, wanted = found[1:], before[1:]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def loss_and_gradients(model: BlockDiffusionLM, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    losses: TokenLosses = model(batch)
    asked = batch["labels"] != IGNORED
    loss = masked_loss(losses.masked, batch["p_mask"][asked], asked.sum())
    if len(losses.next):
        loss = loss + losses.next.mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_copies": 3},
        {"noise_copies": 2, "token_shift": True},
        {"ar_loss_weight": 1.0},
        {"pattern": Pattern.block_noisy},
        {"pattern": Pattern.bidirectional, "token_shift": True},
    ],
)
def test_dropping_unused_blocks_changes_neither_loss_nor_gradient(
    tiny_lm: Any, changes: dict[str, Any]
) -> None:
    chosen = objective(**changes)
    model = BlockDiffusionLM(tiny_lm, chosen)
    # Without a clean half only the pad is left out, and the first row has none.
    rows = example_rows()[0 if chosen.has_clean_half else 1 :]
    whole, less = (joint(chosen, drop, rows) for drop in (False, True))
    assert less["tokens"].shape[1] < whole["tokens"].shape[1]
    torch.testing.assert_close(
        loss_and_gradients(model, whole), loss_and_gradients(model, less), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pattern", list(Pattern))
def test_several_noisy_copies_equal_separate_rows(tiny_lm: Any, pattern: Pattern) -> None:
    chosen = objective(noise_copies=2, pattern=pattern)
    model, batch = BlockDiffusionLM(tiny_lm, chosen), joint(chosen, drop_unused=False)
    with torch.no_grad():
        both = model.hidden_states(batch)
        for number in range(2):
            columns = (batch["copy"][0] == number + 1) | (batch["copy"][0] == 0)
            alone = model.hidden_states({name: value[:, columns] for name, value in batch.items()})
            noisy = both[:, number * L : (number + 1) * L]
            torch.testing.assert_close(alone[:, :L], noisy, rtol=1e-4, atol=1e-5)


def test_a_masked_token_is_predicted_from_its_source_alone(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = objective(token_shift=True)
    model, batch = BlockDiffusionLM(tiny_lm, chosen), joint(chosen)
    hidden = torch.randn(*batch["tokens"].shape, 32, requires_grad=True)
    monkeypatch.setattr(model, "hidden_states", lambda batch: hidden)
    losses = model(batch).masked
    places = (batch["labels"] != IGNORED).nonzero().tolist()
    for number, (row, index) in enumerate(places):
        (gradient,) = torch.autograd.grad(losses[number], hidden, retain_graph=True)
        read = gradient.abs().sum(-1).nonzero().tolist()
        assert read == [[row, int(batch["source"][row, index])]]


def one_document(prompt: int) -> dict[str, Tensor]:
    """A row that one document of L tokens fills."""
    generator = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randint(3, 200, (L,), generator=generator),
        "in_loss": torch.arange(L) >= prompt,
        "position_ids": torch.arange(L),
        "document_ids": torch.zeros(L, dtype=torch.long),
        "sample": torch.tensor(0),
    }


@pytest.mark.parametrize("prompt", [0, 6])
def test_the_next_token_loss_is_that_of_the_stock_causal_model(family_lm: Any, prompt: int) -> None:
    row, chosen = one_document(prompt), objective(ar_loss_weight=1.0)
    losses = BlockDiffusionLM(family_lm, chosen)(joint(chosen, rows=[row]))
    stock = copy.deepcopy(family_lm)
    stock.set_attn_implementation("sdpa")
    labels = row["tokens"].masked_fill(~row["in_loss"], IGNORED)
    expected = stock(row["tokens"][None], labels=labels[None]).loss
    torch.testing.assert_close(losses.next.mean(), expected, rtol=1e-4, atol=1e-5)


def test_without_its_weight_there_is_no_next_token_loss(tiny_lm: Any) -> None:
    assert len(BlockDiffusionLM(tiny_lm, objective())(joint(objective())).next) == 0


def masked_losses(
    lm: Any, chosen: Objective, teacher: Teacher | None, batch: dict[str, Tensor]
) -> Tensor:
    with torch.no_grad():
        losses: Tensor = BlockDiffusionLM(lm, chosen, teacher)(batch).masked
    return losses


def test_a_teacher_equal_to_the_student_teaches_nothing(tiny_lm: Any) -> None:
    pure, mixed = objective(distillation_weight=1.0), objective(distillation_weight=0.25)
    batch = joint(pure)
    teacher = Teacher(copy.deepcopy(tiny_lm), B)
    assert masked_losses(tiny_lm, pure, teacher, batch).abs().max() < 1e-5
    plain = masked_losses(tiny_lm, objective(), None, batch)
    torch.testing.assert_close(masked_losses(tiny_lm, mixed, teacher, batch), 0.75 * plain)
    shorter_blocks = Teacher(copy.deepcopy(tiny_lm), 2)
    assert masked_losses(tiny_lm, pure, shorter_blocks, batch).mean() > 1e-4


def test_a_teacher_sees_the_same_masked_tokens_on_its_own_grid(tiny_lm: Any) -> None:
    chosen = objective(distillation_weight=0.5)
    teacher = Teacher(copy.deepcopy(tiny_lm), 2)
    on_its_grid = joint(chosen, block_length=2)
    with torch.no_grad():
        expected = BlockDiffusionLM(tiny_lm, chosen).hidden_states(on_its_grid)
    asked = on_its_grid["labels"] != IGNORED
    batch = joint(chosen)
    found = teacher.hidden_states(batch)[batch["labels"] != IGNORED]
    torch.testing.assert_close(found, expected[asked], rtol=1e-4, atol=1e-5)


def test_a_teacher_is_frozen_and_no_part_of_the_model(tiny_lm: Any) -> None:
    chosen = objective(distillation_weight=1.0)
    taught = copy.deepcopy(tiny_lm)
    model = BlockDiffusionLM(tiny_lm, chosen, Teacher(taught, 2))
    assert all(name.startswith("causal_lm.") for name, _ in model.named_parameters())
    assert not any(
        p.data_ptr() in {q.data_ptr() for q in taught.parameters()} for p in model.parameters()
    )
    model.train()
    assert not taught.training
    model(joint(chosen)).masked.sum().backward()
    assert all(p.grad is None for p in taught.parameters())
    assert all(p.grad is not None for p in tiny_lm.parameters())


def test_gradient_checkpointing_changes_no_gradient(tiny_lm: Any) -> None:
    model, batch = BlockDiffusionLM(tiny_lm, objective()).train(), joint(objective())
    plain = loss_and_gradients(model, batch)
    tiny_lm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(loss_and_gradients(model, batch), plain)
