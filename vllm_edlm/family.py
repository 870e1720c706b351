"""The checkpoints that can be served: what each architecture's config.json says, and does not.

Pure Python. README, "Models", names the releases behind each entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Facts of one architecture.

    Attributes:
        model_class: class in `vllm_edlm.model` that holds the backbone.
        model_types: `model_type` of the config.json files of this architecture.
        block_length_key: where config.json names the block length.
        block_length: block length of releases whose config.json does not name it.
        mask_token_id: mask token of releases whose config.json does not name it.
        prompt_attention: how the model was trained to see prompts, unless config.json says so.
        token_shift: the hidden state of position p - 1 predicts position p, unless config.json
            says otherwise.
    """

    model_class: str
    model_types: tuple[str, ...]
    block_length_key: str = "block_size"
    block_length: int | None = None
    mask_token_id: int | None = None
    prompt_attention: str = "bidirectional"
    token_shift: bool = False


FAMILIES: Mapping[str, Family] = {
    "EfficientDLM": Family("EfficientDLMForCausalLM", ("qwen3",)),
    "EfficientDLMQwen2ForCausalLM": Family("EfficientDLMQwen2ForCausalLM", ("qwen2",)),
    "EfficientDLMLlamaForCausalLM": Family("EfficientDLMLlamaForCausalLM", ("llama",)),
    "DiffEncoderModel": Family(
        "EfficientDLMForCausalLM", ("qwen3",), block_length=32, mask_token_id=151662
    ),
    "SDARForCausalLM": Family(
        "EfficientDLMForCausalLM",
        ("sdar",),
        block_length=4,
        mask_token_id=151669,
        prompt_attention="block_causal",
    ),
    "Fast_dLLM_QwenForCausalLM": Family(
        "EfficientDLMQwen2ForCausalLM",
        ("Fast_dLLM_Qwen",),
        block_length_key="bd_size",
        block_length=32,
        mask_token_id=151665,
        prompt_attention="block_causal",
        token_shift=True,
    ),
    "NemotronLabsDiffusionModel": Family(
        "NemotronLabsDiffusionForCausalLM",
        ("nemotron_labs_diffusion",),
        block_length=32,
        mask_token_id=100,
        prompt_attention="causal",
    ),
}
"""By the name that stands in `architectures` of config.json."""


def architecture_of(config: Any) -> str | None:
    """The served architecture that a configuration names, if it names one.

    Args:
        config: anything with `architectures`, names or None.
    """
    return next((name for name in config.architectures or () if name in FAMILIES), None)


def normalise(config: Any) -> None:
    """Give a checkpoint's configuration the same attributes whatever its family.

    Sets `block_size` (the block length), `mask_token_id`, `prompt_attention` and `token_shift`
    on `config` (a transformers configuration); what config.json says goes before the family's
    default. May be called again.

    Raises:
        ValueError: the backbone that config.json describes cannot be served, key and value named.
    """
    architecture = next(name for name in config.architectures if name in FAMILIES)
    family = FAMILIES[architecture]
    _check_backbone(config, architecture, family)
    named = {
        "block_size": (family.block_length_key, family.block_length),
        "mask_token_id": ("mask_token_id", family.mask_token_id),
        "prompt_attention": ("prompt_attention", family.prompt_attention),
        "token_shift": ("token_shift", family.token_shift),
    }
    for name, (key, default) in named.items():
        value = getattr(config, key, None)
        setattr(config, name, default if value is None else value)
    if not isinstance(config.token_shift, bool):
        raise ValueError(
            f"token_shift in config.json must be true or false, got {config.token_shift!r}"
        )
    _copy_llama_4_scaling(config)


def _check_backbone(config: Any, architecture: str, family: Family) -> None:
    """Refuse what vLLM's decoder of this backbone would ignore, or run in another way."""
    if config.model_type not in family.model_types:
        others = [
            other for other, facts in FAMILIES.items() if config.model_type in facts.model_types
        ]
        raise ValueError(
            f"model_type {config.model_type!r} in config.json does not belong to architecture "
            f"{architecture}, which takes {', '.join(family.model_types)}; architectures with "
            f"{config.model_type!r}: {', '.join(others) or 'none'}"
        )
    if getattr(config, "use_sliding_window", False) or getattr(config, "sliding_window", None):
        raise ValueError(
            "use_sliding_window / sliding_window in config.json: sliding windows are not supported"
        )
    if getattr(config, "disable_qk_norm", False):
        raise ValueError("disable_qk_norm in config.json must be false, got true")
    head_size = config.hidden_size // config.num_attention_heads
    if "Qwen2" in family.model_class and getattr(config, "head_dim", None) not in (None, head_size):
        raise ValueError(
            f"head_dim in config.json must be hidden_size / num_attention_heads ({head_size}) "
            f"for a Qwen2 backbone, got {config.head_dim}"
        )


def _copy_llama_4_scaling(config: Any) -> None:
    """Name the scaling of queries by position as vLLM's Mistral decoder reads it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "llama_4_scaling_beta" in rope:
        config.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
