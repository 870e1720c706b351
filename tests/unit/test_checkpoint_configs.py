"""What stands on a configuration after `normalise`, for each family's real config.json."""

import pickle
from typing import Any

import pytest
from checkpoints import MASK_ID
from released_configs import NEMOTRON_ROPE, released_config
from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from vllm_edlm.compat.checkpoint_configs import CONFIGS, register_checkpoint_configs
from vllm_edlm.family import FAMILIES, normalise


def load(architecture: str, **keys: object) -> PretrainedConfig:
    """The configuration that transformers makes of a release's config.json."""
    register_checkpoint_configs()
    released = released_config(architecture, 8, MASK_ID, None)
    return AutoConfig.for_model(**(released | keys))


def normalised(architecture: str, **keys: object) -> tuple[Any, ...]:
    config = load(architecture, **keys)
    for _ in range(2):
        normalise(config)
    return config.block_size, config.mask_token_id, config.prompt_attention, config.token_shift


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("EfficientDLM", (8, MASK_ID, "bidirectional", False)),
        ("EfficientDLMQwen2ForCausalLM", (8, MASK_ID, "bidirectional", False)),
        ("EfficientDLMLlamaForCausalLM", (8, MASK_ID, "bidirectional", False)),
        ("DiffEncoderModel", (8, MASK_ID, "bidirectional", False)),
        ("SDARForCausalLM", (4, 151669, "block_causal", False)),
        ("Fast_dLLM_QwenForCausalLM", (32, 151665, "block_causal", True)),
        ("NemotronLabsDiffusionModel", (32, 100, "causal", False)),
    ],
)
def test_released_configurations(architecture: str, expected: tuple[Any, ...]) -> None:
    assert normalised(architecture) == expected


def test_every_family_is_tested_here() -> None:
    assert {c for c in FAMILIES if load(c).model_type in FAMILIES[c].model_types} == set(FAMILIES)


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("EfficientDLM", {"prompt_attention": "block_causal"}, (8, MASK_ID, "block_causal", False)),
        ("EfficientDLM", {"token_shift": True}, (8, MASK_ID, "bidirectional", True)),
        ("DiffEncoderModel", {"block_size": None}, (32, MASK_ID, "bidirectional", False)),
        ("SDARForCausalLM", {"block_size": 16, "mask_token_id": 7}, (16, 7, "block_causal", False)),
        ("Fast_dLLM_QwenForCausalLM", {"bd_size": 8}, (8, 151665, "block_causal", True)),
        ("Fast_dLLM_QwenForCausalLM", {"bd_size": None}, (32, 151665, "block_causal", True)),
    ],
)
def test_config_json_goes_before_the_default(
    architecture: str, keys: dict[str, object], expected: tuple[Any, ...]
) -> None:
    assert normalised(architecture, **keys) == expected


def test_query_scaling_is_named_as_vllm_reads_it() -> None:
    config = load("NemotronLabsDiffusionModel")
    normalise(config)
    assert config.llama_4_scaling == {
        "beta": NEMOTRON_ROPE["llama_4_scaling_beta"],
        "original_max_position_embeddings": NEMOTRON_ROPE["original_max_position_embeddings"],
    }
    assert not hasattr(load("EfficientDLMLlamaForCausalLM"), "llama_4_scaling")


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("EfficientDLM", {"model_type": "qwen2"}, "qwen2.*EfficientDLMQwen2ForCausalLM"),
        ("SDARForCausalLM", {"model_type": "mistral"}, "mistral.*SDARForCausalLM.*none"),
        ("NemotronLabsDiffusionModel", {"sliding_window": 4096}, "sliding_window"),
        (
            "EfficientDLMQwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 16},
            "use_sliding_window",
        ),
        ("EfficientDLM", {"disable_qk_norm": True}, "disable_qk_norm"),
        ("EfficientDLM", {"token_shift": "yes"}, "token_shift.*'yes'"),
        ("EfficientDLMQwen2ForCausalLM", {"head_dim": 64}, "head_dim.*32.*64"),
    ],
)
def test_refused_backbones(architecture: str, keys: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        normalise(load(architecture, **keys))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_configurations_reach_other_processes(config: type[PretrainedConfig]) -> None:
    sent = config(block_size=4)
    assert pickle.loads(pickle.dumps(sent)).to_dict() == sent.to_dict()
    assert Qwen3Config.model_type == "qwen3"
