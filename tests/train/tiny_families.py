"""Random models of a few thousand parameters, one of every family that can be converted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 1,  # Llama's default is the mask token of the tests
}
# Positions of the tests go beyond the 16 that the model is said to have been trained on.
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    "llama": (LlamaConfig, {"rope_parameters": LLAMA_3_ROPE, "attention_bias": True}),
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str, vocab_size: int, **overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model of `family`."""
    config_class, own = _CONFIGS[family]
    return config_class(**{**_SIZES, **own, "vocab_size": vocab_size, **overrides})


def tiny_model(family: str, vocab_size: int, **overrides: Any) -> Any:
    """A model of `family` whose every parameter, biases and norms too, is random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
