"""One forward over [x_t | x_0] equals denoising every block against a cache of clean blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from vllm_edlm.train.data import Document, PackedRows
from vllm_edlm.train.model import BlockDiffusionLM, JointSequence, join
from vllm_edlm.train.noise import corrupt, draw, numbers_needed

B, L, MASK, EOS = 4, 24, 2, 1


def example_batch() -> dict[str, Tensor]:
    """Two rows: a prompt that ends inside a block, several documents, and a pad."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for prompt, answer in ((6, 9), (3, 4), (5, 11), (1, 2)):
        tokens = torch.randint(3, 200, (prompt + answer,), generator=generator).tolist()
        documents.append(Document(tokens, [False] * prompt + [True] * answer))
    rows = PackedRows(documents, L, B, EOS)
    assert len(rows) == 2
    items = [rows[i] for i in range(2)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def joint(batch: dict[str, Tensor], copies: int, drop_unused: bool) -> JointSequence:
    numbers = numbers_needed("position", L, B)
    noise = [
        corrupt("position", draw(0, 0, [0, 1], copy, numbers), batch["in_loss"], B, 0.1)
        for copy in range(copies)
    ]
    return join(batch, noise, MASK, B, drop_unused)


@torch.no_grad()
def cached_hidden(lm: Qwen3ForCausalLM, clean: Tensor, noisy: Tensor) -> Tensor:
    """Hidden states [L, hidden] of the noisy blocks of one document, block by block, as served."""
    cache = DynamicCache(config=lm.config)
    result = []
    for start in range(0, len(clean), B):
        position = torch.arange(start, start + B)[None]
        sees_all = torch.ones(1, 1, B, start + B, dtype=torch.bool)
        denoise, commit = (noisy, copy.deepcopy(cache)), (clean, cache)
        for tokens, past in (denoise, commit):
            output = lm.model(
                input_ids=tokens[None, start : start + B],
                attention_mask=sees_all,
                position_ids=position,
                past_key_values=past,
                use_cache=True,
            ).last_hidden_state[0]
            if past is not cache:
                result.append(output)
    return torch.cat(result)


def test_one_pass_equals_cached_passes(tiny_lm: Qwen3ForCausalLM) -> None:
    batch = example_batch()
    sequence = joint(batch, copies=1, drop_unused=False)
    with torch.no_grad():
        hidden = BlockDiffusionLM(tiny_lm).hidden_states(sequence)
    for row in range(2):
        for document in batch["document_ids"][row].unique().tolist():
            here = batch["document_ids"][row] == document
            noisy, clean = sequence.tokens[row, :L][here], batch["tokens"][row][here]
            expected = cached_hidden(tiny_lm, clean, noisy)
            torch.testing.assert_close(hidden[row, :L][here], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_dropping_unused_blocks_changes_neither_loss_nor_gradient(
    tiny_lm: Qwen3ForCausalLM, copies: int
) -> None:
    model, batch = BlockDiffusionLM(tiny_lm), example_batch()
    whole, less = (joint(batch, copies, drop) for drop in (False, True))
    assert less.tokens.shape[1] < whole.tokens.shape[1]
    gradients = []
    for sequence in (whole, less):
        model.zero_grad()
        loss = model(sequence)
        loss.backward()
        gradients.append((loss.detach(), tiny_lm.model.layers[0].mlp.up_proj.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_copies_are_independent_samples_of_the_same_row(tiny_lm: Qwen3ForCausalLM) -> None:
    model, batch = BlockDiffusionLM(tiny_lm), example_batch()
    with torch.no_grad():
        both = model.hidden_states(joint(batch, 2, drop_unused=False))
        one = model.hidden_states(joint(batch, 1, drop_unused=False))
    torch.testing.assert_close(both[:, :L], one[:, :L], rtol=1e-4, atol=1e-5)


def test_targets_are_not_shifted(tiny_lm: Qwen3ForCausalLM) -> None:
    batch = example_batch()
    sequence = joint(batch, 1, drop_unused=False)
    noisy = slice(0, L)
    assert torch.equal(sequence.targets[:, noisy], batch["tokens"])
    assert (sequence.tokens[:, noisy][sequence.masked[:, noisy]] == MASK).all()
    assert not sequence.masked[:, L:].any(), "no loss on the clean half"
    assert not (sequence.masked[:, noisy] & ~batch["in_loss"]).any()
