"""Shapes of models whose weights are random: what is measured depends on the shape alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_POSITIONS = 32768


@dataclass(frozen=True)
class Shape:
    """A Qwen3 backbone with an untied head; the default is the one that figures are for."""

    layers: int = 28
    hidden: int = 1024
    intermediate: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 32000
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, intermediate {self.intermediate}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, "
            f"vocabulary {self.vocabulary:,}, {self.dtype}"
        )

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "Shape":
        """The shape that a checkpoint's config.json describes."""
        config = json.loads((folder / "config.json").read_text())
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocabulary=config["vocab_size"],
            dtype=config.get("dtype") or config["torch_dtype"],
        )


TINY = Shape(
    layers=2, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=64, vocabulary=512
)
"""Shows that a measurement runs; its figures say nothing."""


def write_config(shape: Shape, folder: Path, block_length: int | None) -> Path:
    """Write a config.json for weights that vLLM makes up (`load_format="dummy"`).

    Args:
        block_length: block length that the diffusion model is served with; None: the AR model
            of the same shape.

    Returns:
        `folder`, which is made if needed.
    """
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "torch_dtype": shape.dtype,
    }
    if block_length is not None:
        config |= {
            "architectures": ["EfficientDLM"],
            "block_size": block_length,
            "mask_token_id": shape.vocabulary - 1,
            "prompt_attention": "block_causal",
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
