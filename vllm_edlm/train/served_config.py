"""config.json and generation_config.json of an export: what serving reads in them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vllm_edlm.family import normalise

if TYPE_CHECKING:
    from vllm_edlm.train.objective import Objective

# By the backbone's `model_type`; `vllm_edlm.family` has the facts of each.
ARCHITECTURES = {
    "qwen3": "EfficientDLM",
    "qwen2": "EfficientDLMQwen2ForCausalLM",
    "llama": "EfficientDLMLlamaForCausalLM",
}
# Of these vLLM computes the same frequencies as transformers, at any length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_convertible(config: Any) -> None:
    """Refuse an AR model whose conversion could not be served as it was trained.

    Args:
        config: the model's transformers configuration.

    Raises:
        ValueError: what stands in the way, key and value of config.json named.
    """
    served = copy.deepcopy(config)
    served.architectures = [_architecture(config)]
    normalise(served)
    rope = getattr(config, "rope_parameters", None) or {}
    values: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "rope_type": (rope.get("rope_type", "default"), ROPE_TYPES),
        "quantization_config": (getattr(config, "quantization_config", None), (None,)),
        "dual_chunk_attention_config": (
            getattr(config, "dual_chunk_attention_config", None),
            (None,),
        ),
    }
    if config.model_type == "qwen3":
        # transformers gives o_proj a bias then, vLLM does not.
        values["attention_bias"] = (config.attention_bias, (False,))
    for key, (value, allowed) in values.items():
        if value not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(
                f"{key} in config.json must be {names} for a conversion, got {value!r}"
            )


def _architecture(config: Any) -> str:
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"models of type {config.model_type!r} cannot be converted; "
            f"allowed: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.model_type]


def checkpoint_config(config: Any, objective: Objective, dtype: torch.dtype) -> dict[str, Any]:
    """The backbone's own fields plus what makes it a block-diffusion model (keys as released).

    Args:
        config: the trained model's transformers configuration.
        dtype: of the exported weights.

    Raises:
        ValueError: the model is of a type that cannot be served.
    """
    own = config.to_diff_dict()
    # It would name the parent's remote code, which the export does not hold.
    own.pop("auto_map", None)
    return own | {
        "architectures": [_architecture(config)],
        "model_type": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "block_size": objective.block_length,
        "mask_token_id": objective.mask_token_id,
        "prompt_attention": prompt_attention(objective),
        "token_shift": objective.token_shift,
        "dlm_paradigm": "bidirectional",
        "dlm_type": "dream" if objective.token_shift else "llada",
        "tok_mask_half_life_ratio": (
            objective.half_life_ratio if objective.noise == "position" else None
        ),
    }


def prompt_attention(objective: Objective) -> str:
    """How the model saw prompts in training, in serving's words.

    Of a bidirectional model that is not all: in training a prompt saw its answer, too. A served one
    has been run before there is an answer, as by the reference decoder with its cache.
    """
    if objective.ar_loss_weight > 0:
        return "causal_grid"
    return "bidirectional" if objective.pattern == "bidirectional" else "block_causal"


def eos_token_ids(causal_lm: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, then those of generation_config.json."""
    parent = causal_lm.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(parent if isinstance(parent, list) else [parent])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def generation_settings(causal_lm: Any, tokenizer: Any) -> dict[str, Any]:
    """What a server may apply to every request: where answers end, and that decoding is greedy.

    The parent's sampling parameters are left out: they were chosen for another model.
    """
    ends = eos_token_ids(causal_lm, tokenizer)
    pads = (tokenizer.pad_token_id, causal_lm.generation_config.pad_token_id)
    pad = next((i for i in pads if i is not None), None)
    settings = {"do_sample": False, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return settings if pad is None else settings | {"pad_token_id": pad}
