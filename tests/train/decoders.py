"""Tiny stock decoders, run over a joint sequence with any attention, and with SDPA's dense mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.train.grids import rows_of
from vllm_edlm.train.attention import attention_inputs
from vllm_edlm.train.masks import Grid, dense_mask

FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
ROWS = rows_of([18, 27, 5], [44, 6])


def tiny_model(family: str = "qwen3", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "sdpa",
    }
    if family == "qwen3":
        shape["head_dim"] = 8
    return model(config(**{**shape, **changes})).base_model


def run(model: PreTrainedModel, grid: Grid, **inputs: Any) -> Tensor:
    """Last hidden states [N, T, hidden]; without `inputs`, as the model's implementation wants."""
    if not inputs:
        inputs = attention_inputs(model.config._attn_implementation, grid)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, grid.copy.shape, generator=generator).to(model.device)
    output = model(input_ids=tokens, position_ids=grid.position, use_cache=False, **inputs)
    return output.last_hidden_state


def with_gradients(model: PreTrainedModel, grid: Grid, **inputs: Any) -> dict[str, Tensor]:
    """Hidden states, and every parameter's gradient divided by its largest entry."""
    model.zero_grad()
    hidden = run(model, grid, **inputs)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    weights = weights.to(model.device)
    (hidden * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("k_proj" in name for name in gradients)
    return {"hidden": hidden.detach(), **{name: g / g.abs().max() for name, g in gradients.items()}}


def dense(model: PreTrainedModel, grid: Grid) -> dict[str, Tensor]:
    model.set_attn_implementation("sdpa")
    return with_gradients(model, grid, attention_mask=dense_mask(grid))


def assert_equals_dense(model: PreTrainedModel, name: str, grid: Grid) -> None:
    expected = dense(model, grid)
    model.set_attn_implementation(name)
    torch.testing.assert_close(with_gradients(model, grid), expected, rtol=1e-5, atol=1e-5)
