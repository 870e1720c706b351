"""What an export's JSON files tell serving; models that could not be served are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, LLAMA_3_ROPE, tiny_config, tiny_model
from transformers import AutoConfig, PreTrainedTokenizerFast

from vllm_edlm.family import architecture_of, normalise
from vllm_edlm.train.export import export
from vllm_edlm.train.masks import Pattern
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.served_config import ARCHITECTURES, check_convertible, checkpoint_config

OBJECTIVE = Objective(block_length=8, mask_token_id=2)


def written(directory: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


@pytest.mark.parametrize("family", FAMILIES)
def test_serving_reads_what_was_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    trained = tiny_model(family, len(tokenizer))
    export(tmp_path, trained, tokenizer, OBJECTIVE)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(trained.config)
    assert architecture_of(config) == ARCHITECTURES[family]
    normalise(config)
    assert (config.block_size, config.mask_token_id) == (8, 2)
    assert (config.prompt_attention, config.token_shift) == ("block_causal", False)
    assert (config.dlm_type, config.dlm_paradigm) == ("llada", "bidirectional")
    assert config.tok_mask_half_life_ratio == 0.1
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters == trained.config.rope_parameters
    for key in ("attention_bias", "mlp_bias", "head_dim", "rms_norm_eps", "hidden_act"):
        assert getattr(config, key, None) == getattr(trained.config, key, None), key


@pytest.mark.parametrize(
    ("axes", "prompt_attention", "dlm_type"),
    [
        ({}, "block_causal", "llada"),
        ({"pattern": Pattern.block_noisy}, "block_causal", "llada"),
        ({"pattern": Pattern.bidirectional}, "bidirectional", "llada"),
        ({"ar_loss_weight": 0.3}, "causal_grid", "llada"),
        ({"token_shift": True}, "block_causal", "dream"),
    ],
)
def test_the_objective_says_how_to_decode(
    axes: dict[str, Any], prompt_attention: str, dlm_type: str
) -> None:
    config = checkpoint_config(tiny_config("qwen3", 100), Objective(8, 2, **axes), torch.bfloat16)
    assert config["prompt_attention"] == prompt_attention
    assert config["dlm_type"] == dlm_type
    assert config["token_shift"] is axes.get("token_shift", False)


def test_uniform_noise_names_no_half_life() -> None:
    objective = Objective(8, 2, noise="uniform")
    config = checkpoint_config(tiny_config("qwen3", 100), objective, torch.bfloat16)
    assert config["tok_mask_half_life_ratio"] is None


def test_qwen2_names_no_head_size(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    export(tmp_path, tiny_model("qwen2", len(tokenizer)), tokenizer, OBJECTIVE)
    assert "head_dim" not in written(tmp_path, "config.json")


def test_what_a_parent_says_of_its_own_diffusion_is_replaced() -> None:
    stale = {"block_size": 4, "mask_token_id": 9, "prompt_attention": "bidirectional"}
    code = {"AutoConfig": "configuration_edlm.EfficientDLMConfig"}
    parent = tiny_config("qwen3", 100, **stale, token_shift=True, auto_map=code)
    config = checkpoint_config(parent, OBJECTIVE, torch.bfloat16)
    assert (config["block_size"], config["mask_token_id"]) == (8, 2)
    assert (config["prompt_attention"], config["token_shift"]) == ("block_causal", False)
    assert "auto_map" not in config, "its code is not in the export"


def test_generation_keeps_every_end_and_no_sampling(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained = tiny_model("qwen3", len(tokenizer))
    trained.generation_config.update(
        eos_token_id=[7, tokenizer.eos_token_id], do_sample=True, temperature=0.6, top_k=20
    )
    export(tmp_path, trained, tokenizer, OBJECTIVE)
    assert written(tmp_path, "generation_config.json") == {
        "do_sample": False,
        "eos_token_id": [tokenizer.eos_token_id, 7],
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_can_be_converted(family: str) -> None:
    check_convertible(tiny_config(family, 100))


def with_rope(rope_type: str) -> dict[str, Any]:
    return {"rope_parameters": LLAMA_3_ROPE | {"rope_type": rope_type}}


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "sliding windows are not supported"),
        ("qwen2", {"head_dim": 64}, r"head_dim in config.json must be .* \(16\)"),
        ("qwen3", {"disable_qk_norm": True}, "disable_qk_norm in config.json must be false"),
        ("qwen3", {"attention_bias": True}, "attention_bias in config.json must be False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act in config.json must be silu .* got 'gelu'"),
        ("llama", with_rope("dynamic"), "rope_type in config.json must be default, .* 'dynamic'"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention"),
    ],
)
def test_what_serving_would_compute_otherwise_is_refused(
    family: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_convertible(tiny_config(family, 100, **overrides))


def test_other_model_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"type 'gpt2' cannot be converted; allowed: qwen3, qwen2"):
        check_convertible(AutoConfig.for_model("gpt2"))
