"""The oracle's decoder and the random checkpoints against transformers' own decoders."""

import pytest
import torch
from checkpoints import VOCABULARY_SIZE, CheckpointFactory, CheckpointSpec
from oracle_model import OracleModel, causal_mask
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from vllm_edlm.compat.checkpoint_configs import register_checkpoint_configs


@pytest.mark.parametrize(
    ("architecture", "backbone"),
    [
        ("DiffEncoderModel", Qwen3ForCausalLM),
        ("SDARForCausalLM", Qwen3ForCausalLM),
        ("EfficientDLMQwen2ForCausalLM", Qwen2ForCausalLM),
        ("Fast_dLLM_QwenForCausalLM", Qwen2ForCausalLM),
        ("EfficientDLMLlamaForCausalLM", LlamaForCausalLM),
        ("NemotronLabsDiffusionModel", Ministral3ForCausalLM),
    ],
)
def test_causal_forward_equals_transformers(
    checkpoint: CheckpointFactory, architecture: str, backbone: type[PreTrainedModel]
) -> None:
    register_checkpoint_configs()
    path = checkpoint(CheckpointSpec(architecture, "plain"))
    config = AutoConfig.from_pretrained(path)
    ids = torch.randint(VOCABULARY_SIZE, (150,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = backbone.from_pretrained(path, config=config, dtype=torch.float32)
        expected = model(ids[None]).logits[0]
        got = OracleModel.load(path).logits(ids, causal_mask(len(ids)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
