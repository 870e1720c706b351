"""The config.json files of the served families, as released but for the sizes."""

from collections.abc import Mapping

Config = dict[str, object]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
# Qwen2 has no head_dim of its own: hidden_size / num_attention_heads.
QWEN2_SIZES = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}
COMMON: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "bos_token_id": None,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# In 32 positions as in the release's 16384: requests of the tests go beyond them.
NEMOTRON_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def released_config(
    architecture: str, block_length: int, mask_token_id: int, prompt_attention: str | None
) -> Config:
    """The config.json of a checkpoint of `architecture`, without vocabulary and EOS.

    A family whose releases do not name block length or mask token does not name them here.
    """
    config = COMMON | _FAMILY_KEYS.get(architecture, {}) | {"architectures": [architecture]}
    if "EfficientDLM" in architecture or architecture == "DiffEncoderModel":
        config |= _efficient_dlm_keys(block_length, mask_token_id)
        if prompt_attention is not None:
            config["prompt_attention"] = prompt_attention
    return config


def _efficient_dlm_keys(block_length: int, mask_token_id: int) -> Config:
    module = {"AutoConfig": "configuration_edlm.EfficientDLMConfig"}
    return {
        "auto_map": {**module, "AutoModel": "modeling_edlm.EfficientDLM"},
        "block_size": block_length,
        "mask_token_id": mask_token_id,
        "dlm_paradigm": "bidirectional",
        "dlm_type": "llada",
        "tok_mask_half_life_ratio": None,
        "disable_qk_norm": False,
        **dict.fromkeys(("diff_loss_weight", "dlm_arch", "intl_mask", "prefix_ratio")),
        **dict.fromkeys(("adaptive_mask_rate", "enforce_mask", "multi_sampling"), False),
        **dict.fromkeys(("num_ar_layers", "num_diffusion_layers", "random_length_prob"), 0),
    }


def _without(config: Mapping[str, object], *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


_WINDOWS_OFF = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
_FAMILY_KEYS: dict[str, Config] = {
    "EfficientDLM": {"model_type": "qwen3", **SIZES},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **SIZES},
    "DiffEncoderModel": {"model_type": "qwen3", **SIZES},
    "EfficientDLMQwen2ForCausalLM": {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_without(QWEN2_SIZES, "head_dim"),
    },
    "EfficientDLMLlamaForCausalLM": {
        "model_type": "llama",
        "mlp_bias": False,
        "rope_parameters": LLAMA_3_ROPE,
        **SIZES,
    },
    "SDARForCausalLM": {
        "model_type": "sdar",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "fuse_cross_entropy": True,
        **_WINDOWS_OFF,
        **SIZES,
    },
    "Fast_dLLM_QwenForCausalLM": {
        "model_type": "Fast_dLLM_Qwen",
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": 32,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": True,
        **_WINDOWS_OFF,
        **_without(QWEN2_SIZES, "head_dim"),
    },
    "NemotronLabsDiffusionModel": {
        "model_type": "nemotron_labs_diffusion",
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        "attn_implementation": "sdpa",
        "ar_loss_weight": 1.0,
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "block_size": 32,
        "mask_token_id": 100,
        "mlp_bias": False,
        "rope_parameters": NEMOTRON_ROPE,
        "sliding_window": None,
        **SIZES,
    },
}
