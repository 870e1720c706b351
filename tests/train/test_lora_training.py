"""LoRA: what trains, what the model computes before, during and after, under which names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from vllm_edlm.train.lora import add_lora, merge_lora

TOKENS = torch.arange(24).view(2, 12)
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(params=[Qwen3Config, Qwen2Config, LlamaConfig], ids=["qwen3", "qwen2", "llama"])
def causal_lm(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param(**SHAPE))


@torch.no_grad()
def logits(causal_lm: Any) -> Tensor:
    result: Tensor = causal_lm(TOKENS).logits
    return result


def train_a_little(causal_lm: Any) -> None:
    parameters = [p for p in causal_lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        causal_lm(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


def test_only_the_linear_layers_own_weights_are_frozen(causal_lm: Any) -> None:
    before = {n: p.clone() for n, p in causal_lm.named_parameters()}
    add_lora(causal_lm, rank=4, alpha=8)
    layer = causal_lm.model.layers[0]
    for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        assert projection.lora_A["default"].weight.shape[0] == 4
    train_a_little(causal_lm)
    moved = {
        name
        for name, parameter in causal_lm.named_parameters()
        if name in before and not torch.equal(parameter, before[name])
    }
    assert moved == {n for n in before if "norm" in n or "embed_tokens" in n or "lm_head" in n}
    for name, parameter in causal_lm.named_parameters():
        if ".base_layer." in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_adapters_change_nothing_before_the_first_step(causal_lm: Any) -> None:
    before = logits(causal_lm)
    add_lora(causal_lm, rank=4, alpha=8)
    assert torch.equal(logits(causal_lm), before)


def test_the_merged_model_is_a_stock_one_with_the_same_logits(causal_lm: Any) -> None:
    stock = {name: weight.shape for name, weight in causal_lm.state_dict().items()}
    start = logits(causal_lm)
    add_lora(causal_lm, rank=4, alpha=8)
    train_a_little(causal_lm)
    trained = logits(causal_lm)
    assert not torch.allclose(trained, start, atol=1e-2)
    merged = merge_lora(causal_lm)
    assert merged is causal_lm
    assert {name: weight.shape for name, weight in merged.state_dict().items()} == stock
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)


def test_a_state_dict_brings_everything_back(causal_lm: Any) -> None:
    resumed = copy.deepcopy(causal_lm)
    add_lora(causal_lm, rank=4, alpha=8)
    train_a_little(causal_lm)
    add_lora(resumed, rank=4, alpha=8)
    resumed.load_state_dict(causal_lm.state_dict())
    assert torch.equal(logits(resumed), logits(causal_lm))
    trainable = [[p.requires_grad for p in lm.parameters()] for lm in (causal_lm, resumed)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 8, r"LoRA rank must be 1 to 32 \(the hidden size\), got 0"),
        (33, 8, "LoRA rank must be 1 to 32 .*, got 33"),
        (4, 0, "LoRA alpha must be a finite number above 0, got 0"),
        (4, -1.0, "alpha .* got -1.0"),
        (4, float("inf"), "alpha .* got inf"),
        (4, float("nan"), "alpha .* got nan"),
    ],
)
def test_bad_ranks_and_alphas_are_named(
    causal_lm: Any, rank: int, alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(causal_lm, rank, alpha)
