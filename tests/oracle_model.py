"""The oracle's decoder: fp32, one sequence, no cache, any dense attention mask.

Qwen3, Qwen2, Llama and Ministral 3 differ in what the checkpoint holds: a norm of queries and
keys, biases, a head of its own; and in how positions turn queries and keys (`oracle_rope`).

Shapes: T tokens, D hidden size, N query heads, K key-value heads, H head size, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from oracle_rope import head_size, query_scale, rotary, rotate
from safetensors.torch import load_file
from torch import Tensor

HEAD_NAMES = ("diffusion_head.weight", "lm_head.weight")


@dataclass(frozen=True)
class OracleModel:
    """A decoder without a cache; weight names carry neither `encoder.` nor `model.`."""

    config: dict
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "OracleModel":
        """Read a checkpoint folder in either weight layout."""
        config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        return cls(config, {_bare_name(name): t.float() for name, t in tensors.items()})

    def logits(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [T, V] of `token_ids` [T]; query row i sees key column j where mask is true."""
        x = self.weights["embed_tokens.weight"][token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"layers.{layer}."
            h = self._norm(prefix + "input_layernorm", x)
            x = x + self._attention(prefix + "self_attn.", h, mask)
            h = self._norm(prefix + "post_attention_layernorm", x)
            x = x + self._mlp(prefix + "mlp.", h)
        head = "embed_tokens" if self.config["tie_word_embeddings"] else "head"
        return self._norm("norm", x) @ self.weights[head + ".weight"].T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.weights[name + ".weight"] * (x * scale)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """Project `x` [T, D] to heads [N or K, T, H]."""
        return self._linear(name, x).unflatten(-1, (-1, head_size(self.config))).movedim(1, 0)

    def _attention(self, prefix: str, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self._heads(f"{prefix}{name}_proj", x) for name in "qkv")
        if prefix + "q_norm.weight" in self.weights:
            q, k = self._norm(prefix + "q_norm", q), self._norm(prefix + "k_norm", k)
        cos_sin = rotary(len(x), self.config)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        q = q * query_scale(len(x), self.config)[:, None]
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        k, v = (t.repeat_interleave(group, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(head_size(self.config))
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return self._linear(prefix + "o_proj", (weights @ v).movedim(0, 1).flatten(1))

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate = F.silu(self._linear(prefix + "gate_proj", x))
        return self._linear(prefix + "down_proj", gate * self._linear(prefix + "up_proj", x))


def _bare_name(name: str) -> str:
    if name in HEAD_NAMES:
        return "head.weight"
    return name.removeprefix("encoder.").removeprefix("model.")


def causal_mask(length: int) -> Tensor:
    """Token-causal mask [T, T], for stock autoregressive checkpoints."""
    return torch.ones(length, length, dtype=torch.bool).tril()
