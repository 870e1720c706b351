"""Write a trained model as an `EfficientDLM` checkpoint that stock `AutoConfig` loads.

Two layouts of weight names exist in the wild and both are served: `efficient_dlm`
(`encoder.*` and an untied `diffusion_head.weight`) and `plain` (`model.*`, `lm_head.weight`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_edlm.train.trainer import Objective

Layout = Literal["efficient_dlm", "plain"]
_HEAD = {"efficient_dlm": "diffusion_head.weight", "plain": "lm_head.weight"}
_BACKBONE = {"efficient_dlm": "encoder.", "plain": "model."}

# Released checkpoints are Qwen3; serving builds its backbone by this type.
SUPPORTED_MODEL_TYPES = ("qwen3",)
_MASK_TOKEN = "<|mask|>"


def choose_mask_token(tokenizer: Any, causal_lm: Any, mask_token_id: int | None = None) -> int:
    """Decide on the mask token; adds one, and resizes the embeddings, where there is none.

    Order: the id that is asked for, the tokenizer's own mask token, a new token `<|mask|>`.

    Raises:
        ValueError: the id is outside the model's vocabulary, or it is the EOS token.
    """
    rows = causal_lm.get_input_embeddings().num_embeddings
    chosen = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if chosen is None:
        tokenizer.add_special_tokens({"mask_token": _MASK_TOKEN})
        chosen = tokenizer.mask_token_id
        # Vocabularies are often padded beyond the tokenizer; then there is a free row already.
        if chosen >= rows:
            causal_lm.resize_token_embeddings(chosen + 1, mean_resizing=True)
            rows = chosen + 1
    if not 0 <= chosen < rows:
        raise ValueError(f"mask token id {chosen} is outside the vocabulary (0..{rows - 1})")
    if chosen == tokenizer.eos_token_id:
        raise ValueError(f"mask token id {chosen} is the EOS token; choose an unused id")
    return int(chosen)


def untie_head(causal_lm: Any) -> None:
    """Give the output head weights of its own, equal to the embeddings it shared."""
    head = causal_lm.get_output_embeddings()
    if head.weight is causal_lm.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    causal_lm.config.tie_word_embeddings = False


def export(
    directory: Path,
    causal_lm: Any,
    tokenizer: Any,
    objective: Objective,
    layout: Layout = "efficient_dlm",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config, weights, tokenizer, chat template and generation config into `directory`.

    Raises:
        ValueError: the model is of a type that cannot be served as `EfficientDLM`.
    """
    model_type = causal_lm.config.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        allowed = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"cannot export model type {model_type!r}; allowed: {allowed}")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    weights = renamed_weights(causal_lm, layout, dtype)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", checkpoint_config(causal_lm, objective, dtype))
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    _write_json(directory / "generation_config.json", generation)


def renamed_weights(causal_lm: Any, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's weights under a layout's names; the head is always written untied.

    Raises:
        ValueError: the layout is unknown.
    """
    if layout not in _HEAD:
        raise ValueError(f"unknown weight layout {layout!r}; allowed: {', '.join(_HEAD)}")
    weights = {
        _BACKBONE[layout] + name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
        for name, tensor in causal_lm.base_model.state_dict().items()
    }
    head = causal_lm.get_output_embeddings().weight
    weights[_HEAD[layout]] = head.detach().to("cpu", dtype, copy=True).contiguous()
    return weights


def checkpoint_config(
    causal_lm: Any, objective: Objective, dtype: torch.dtype
) -> dict[str, object]:
    """The backbone's own fields plus what makes it an `EfficientDLM` (keys as released)."""
    config: dict[str, object] = causal_lm.config.to_diff_dict()
    config |= {name: getattr(causal_lm.config, name) for name in _SHAPE_FIELDS}
    position_noise = objective.noise == "position"
    return config | {
        "architectures": ["EfficientDLM"],
        "model_type": causal_lm.config.model_type,
        "block_size": objective.block_length,
        "mask_token_id": objective.mask_token_id,
        "prompt_attention": "block_causal",
        "dlm_paradigm": "bidirectional",
        "dlm_type": "llada",
        "tok_mask_half_life_ratio": objective.half_life_ratio if position_noise else None,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "hidden_act",
)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
