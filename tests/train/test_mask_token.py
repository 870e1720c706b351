"""The mask token: the one asked for, the tokenizer's, or a new one with a row of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import vllm_edlm.train.export as export_module
from vllm_edlm.train.export import choose_mask_token, export, untie_head
from vllm_edlm.train.objective import Objective


@pytest.fixture
def ar_pair(tiny_lm: Any, ar_directory: Path) -> tuple[PreTrainedTokenizerFast, Any]:
    """Tokenizer and model of a test's own, free to be changed."""
    return AutoTokenizer.from_pretrained(ar_directory), tiny_lm


def test_a_missing_mask_token_is_added_with_a_row_for_it(
    ar_pair: tuple[PreTrainedTokenizerFast, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = ar_pair
    tokenizer.mask_token = None
    monkeypatch.setattr(export_module, "_MASK_TOKEN", "<|new|>")
    rows = model.get_input_embeddings().num_embeddings
    assert choose_mask_token(tokenizer, model) == rows, "the next free id"
    assert tokenizer.convert_tokens_to_ids("<|new|>") == rows
    assert model.get_input_embeddings().num_embeddings == rows + 1
    assert model.get_output_embeddings().weight.shape[0] == rows + 1
    assert model.config.vocab_size == rows + 1


def test_a_mask_token_named_by_its_id_becomes_the_tokenizers(
    ar_pair: tuple[PreTrainedTokenizerFast, Any], tmp_path: Path
) -> None:
    tokenizer, model = ar_pair
    chosen = tokenizer.convert_tokens_to_ids("<|user|>")
    assert choose_mask_token(tokenizer, model, chosen) == chosen
    export(tmp_path, model, tokenizer, Objective(8, chosen))
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == chosen


def test_a_row_beyond_the_tokenizer_serves_as_mask(
    ar_pair: tuple[PreTrainedTokenizerFast, Any],
) -> None:
    tokenizer, model = ar_pair
    model.resize_token_embeddings(len(tokenizer) + 8)
    assert choose_mask_token(tokenizer, model, len(tokenizer) + 3) == len(tokenizer) + 3
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 8


@pytest.mark.parametrize("mask_token_id", [-1, 10_000])
def test_a_mask_id_outside_the_vocabulary_is_refused(
    ar_pair: tuple[PreTrainedTokenizerFast, Any], mask_token_id: int
) -> None:
    with pytest.raises(ValueError, match=f"mask token id {mask_token_id} is outside"):
        choose_mask_token(*ar_pair, mask_token_id)


def test_a_vocabulary_without_room_is_refused(
    ar_pair: tuple[PreTrainedTokenizerFast, Any],
) -> None:
    tokenizer, model = ar_pair
    tokens = len(tokenizer)
    model.resize_token_embeddings(tokens - 1)
    for mask_token_id in (None, 2):
        with pytest.raises(ValueError, match=f"{tokens} tokens, .* {tokens - 1}: .* no room"):
            choose_mask_token(tokenizer, model, mask_token_id)


def test_every_eos_is_refused_as_mask(ar_pair: tuple[PreTrainedTokenizerFast, Any]) -> None:
    tokenizer, model = ar_pair
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    for end in (tokenizer.eos_token_id, 7):
        with pytest.raises(ValueError, match=f"mask token id {end} is an EOS token"):
            choose_mask_token(tokenizer, model, end)


def test_ordinary_text_is_no_mask(ar_pair: tuple[PreTrainedTokenizerFast, Any]) -> None:
    tokenizer, model = ar_pair
    (word,) = tokenizer("7", add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match=f"mask token id {word} is '.*7', of which text is made"):
        choose_mask_token(tokenizer, model, word)


def test_an_untied_head_starts_as_the_embeddings_and_learns_alone(tiny_lm: Any) -> None:
    untie_head(tiny_lm)
    embeddings = tiny_lm.get_input_embeddings().weight
    head = tiny_lm.get_output_embeddings().weight
    assert torch.equal(embeddings, head)
    assert embeddings.data_ptr() != head.data_ptr()
    assert tiny_lm.config.tie_word_embeddings is False
