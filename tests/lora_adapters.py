"""Random LoRA adapters on disk as peft writes them, and the oracle with one merged in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from oracle_model import OracleModel
from safetensors.torch import save_file
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PREFIXES = {"plain": ("model.", "lm_head"), "encoder": ("encoder.", "diffusion_head")}
"""Of module names in each layout: what goes before a backbone's module, and the head."""


@dataclass(frozen=True)
class AdapterSpec:
    """A random adapter; `targets` are last components of bare module names."""

    targets: tuple[str, ...]
    layout: str
    rank: int
    alpha: int
    seed: int


SPECS = {
    "linear": AdapterSpec((*ATTENTION, *MLP), "plain", rank=4, alpha=8, seed=1),
    "ends": AdapterSpec(("q_proj", "embed_tokens", "head"), "encoder", rank=8, alpha=8, seed=2),
    "mlp": AdapterSpec(MLP, "encoder", rank=2, alpha=6, seed=3),
}


def write_adapter(path: Path, spec: AdapterSpec, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter for `weights` (bare names) into the folder `path`, as peft does."""
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": list(spec.targets),
        "bias": "none",
        "modules_to_save": None,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{_module_name(module, spec.layout)}.{kind}": tensor.contiguous()
        for module, factors in _factors(spec, weights).items()
        for kind, tensor in zip(_kinds(module), factors, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def _module_name(module: str, layout: str) -> str:
    backbone, head = PREFIXES[layout]
    return head if module == "head" else backbone + module


def _kinds(module: str) -> tuple[str, str]:
    if module == "embed_tokens":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _factors(spec: AdapterSpec, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, input] and B [output, R] of each targeted module, by bare module name."""
    generator = torch.Generator().manual_seed(spec.seed)
    factors = {}
    for name in sorted(weights):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in spec.targets:
            continue
        outputs, inputs = weights[name].shape
        if module == "embed_tokens":  # A table: its input is a token id.
            outputs, inputs = inputs, outputs
        a = torch.randn(spec.rank, inputs, generator=generator) * inputs**-0.25
        b = torch.randn(outputs, spec.rank, generator=generator) * inputs**-0.25
        factors[module] = a, b
    return factors


def merged(oracle: OracleModel, spec: AdapterSpec) -> OracleModel:
    """The oracle with W + alpha / rank * B A in place of every targeted W."""
    weights = dict(oracle.weights)
    for module, (a, b) in _factors(spec, oracle.weights).items():
        delta = spec.alpha / spec.rank * (b @ a)
        name = f"{module}.weight"
        weights[name] = weights[name] + (delta.T if module == "embed_tokens" else delta)
    return replace(oracle, weights=weights)
