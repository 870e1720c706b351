"""The oracle's Qwen3 decoder: fp32, one sequence, no cache, any dense attention mask.

Shapes: T tokens, D hidden size, N query heads, K key-value heads, H head size, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HEAD_NAMES = ("diffusion_head.weight", "lm_head.weight")


@dataclass(frozen=True)
class OracleModel:
    """A Qwen3 decoder without a cache; weight names carry neither `encoder.` nor `model.`."""

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
        cos_sin = _rotary(len(token_ids), self.config["head_dim"], self.config["rope_theta"])
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"layers.{layer}."
            h = self._norm(prefix + "input_layernorm", x)
            x = x + self._attention(prefix + "self_attn.", h, cos_sin, mask)
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
        return self._linear(name, x).unflatten(-1, (-1, self.config["head_dim"])).movedim(1, 0)

    def _attention(
        self, prefix: str, x: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        q = self._norm(prefix + "q_norm", self._heads(prefix + "q_proj", x))
        k = self._norm(prefix + "k_norm", self._heads(prefix + "k_proj", x))
        v = self._heads(prefix + "v_proj", x)
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        q, k = _rotate(q, *cos_sin), _rotate(k, *cos_sin)
        k, v = (t.repeat_interleave(group, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.config["head_dim"])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return self._linear(prefix + "o_proj", (weights @ v).movedim(0, 1).flatten(1))

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate = F.silu(self._linear(prefix + "gate_proj", x))
        return self._linear(prefix + "down_proj", gate * self._linear(prefix + "up_proj", x))


def _bare_name(name: str) -> str:
    if name in HEAD_NAMES:
        return "head.weight"
    return name.removeprefix("encoder.").removeprefix("model.")


def _rotary(length: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, H] of positions 0..T-1, the second half repeating the first."""
    inverse = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_mask(length: int) -> Tensor:
    """Token-causal mask [T, T], for stock autoregressive checkpoints."""
    return torch.ones(length, length, dtype=torch.bool).tril()
