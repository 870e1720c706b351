"""Exports load back, in both weight layouts, with stock AutoConfig; bad choices are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

import vllm_edlm.train.export as export_module
from vllm_edlm.train.export import Layout, choose_mask_token, export, untie_head
from vllm_edlm.train.trainer import Objective

PREFIXES = {"efficient_dlm": ("encoder.", "diffusion_head."), "plain": ("model.", "lm_head.")}


@pytest.mark.parametrize("layout", ["efficient_dlm", "plain"])
def test_an_export_holds_the_same_model(
    tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, layout: Layout
) -> None:
    untie_head(tiny_lm)
    objective = Objective(block_length=16, mask_token_id=tokenizer.mask_token_id)
    export(tmp_path, tiny_lm, tokenizer, objective, layout, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    backbone, head = PREFIXES[layout]
    assert all(name.startswith((backbone, head)) for name in weights)
    renamed = {
        name.replace(backbone, "model.", 1).replace(head, "lm_head.", 1): tensor
        for name, tensor in weights.items()
    }
    assert renamed.keys() == tiny_lm.state_dict().keys()
    for name, tensor in tiny_lm.state_dict().items():
        assert torch.equal(tensor, renamed[name]), name


def test_the_config_is_what_serving_reads(
    tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    untie_head(tiny_lm)
    objective = Objective(block_length=8, mask_token_id=tokenizer.mask_token_id)
    export(tmp_path, tiny_lm, tokenizer, objective)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "Qwen3Config"
    assert config.architectures == ["EfficientDLM"]
    assert (config.block_size, config.mask_token_id) == (8, tokenizer.mask_token_id)
    assert config.prompt_attention == "block_causal"
    assert config.tok_mask_half_life_ratio == 0.1
    assert (config.dlm_type, config.dlm_paradigm) == ("llada", "bidirectional")
    assert config.tie_word_embeddings is False
    assert config.dtype == torch.bfloat16
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert all(
        tensor.dtype == torch.bfloat16
        for tensor in load_file(tmp_path / "model.safetensors").values()
    )
    assert (tmp_path / "generation_config.json").is_file()


def test_a_missing_mask_token_is_added_with_a_row_for_it(
    tiny_lm: Qwen3ForCausalLM, ar_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ar_directory)
    tokenizer.mask_token = None
    monkeypatch.setattr(export_module, "_MASK_TOKEN", "<|new|>")
    rows = tiny_lm.get_input_embeddings().num_embeddings
    assert choose_mask_token(tokenizer, tiny_lm) == rows, "the next free id"
    assert tokenizer.convert_tokens_to_ids("<|new|>") == rows
    assert tiny_lm.get_input_embeddings().num_embeddings == rows + 1
    assert tiny_lm.get_output_embeddings().weight.shape[0] == rows + 1
    assert tiny_lm.config.vocab_size == rows + 1


@pytest.mark.parametrize("mask_token_id", [-1, 10_000])
def test_a_mask_id_outside_the_vocabulary_is_refused(
    tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, mask_token_id: int
) -> None:
    with pytest.raises(ValueError, match=f"mask token id {mask_token_id} is outside"):
        choose_mask_token(tokenizer, tiny_lm, mask_token_id)


def test_eos_as_mask_is_refused(
    tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="is the EOS token"):
        choose_mask_token(tokenizer, tiny_lm, tokenizer.eos_token_id)


def test_unknown_layout_and_model_type(
    tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    objective = Objective(block_length=8, mask_token_id=2)
    with pytest.raises(ValueError, match="unknown weight layout 'x'"):
        export(tmp_path, tiny_lm, tokenizer, objective, "x")  # type: ignore[arg-type]
    tiny_lm.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="cannot export model type 'gpt2'"):
        export(tmp_path, tiny_lm, tokenizer, objective)
