"""Configurations of model types that transformers does not know.

Each is a known backbone under another name; keys of the release's own are kept as attributes.
A subclass, since vLLM sets `model_type` on the class that it finds for a type.
"""

from transformers import AutoConfig, Ministral3Config, PretrainedConfig, Qwen2Config, Qwen3Config


class SDARConfig(Qwen3Config):
    """config.json of `SDARForCausalLM`."""

    model_type = "sdar"


class FastDLLMQwenConfig(Qwen2Config):
    """config.json of `Fast_dLLM_QwenForCausalLM`."""

    model_type = "Fast_dLLM_Qwen"


class NemotronLabsDiffusionConfig(Ministral3Config):
    """config.json of `NemotronLabsDiffusionModel`."""

    model_type = "nemotron_labs_diffusion"


CONFIGS: tuple[type[PretrainedConfig], ...] = (
    SDARConfig,
    FastDLLMQwenConfig,
    NemotronLabsDiffusionConfig,
)


def register_checkpoint_configs() -> None:
    """Let `AutoConfig` load these types, so that no release needs its remote code."""
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
