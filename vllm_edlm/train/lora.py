"""Low-rank adapters on the linear layers; embeddings, norms and head train in full.

That is the setting of the paper's LoRA rows (arXiv 2512.14067): a new mask token and the way tokens
are predicted need embeddings and head, which an adapter beside the linear layers cannot change.
"""

from __future__ import annotations

import math
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer


def add_lora(causal_lm: Any, rank: int, alpha: float) -> None:
    """Put an adapter beside every linear layer but the head, and freeze those layers, in place.

    A layer's output gains alpha / rank * B A x. B starts at zero, so that the model computes at
    first what it did before. Everything else in the model stays trainable.

    Args:
        causal_lm: a transformers causal LM.
        rank: of A and B, at least 1 and at most the hidden size.
        alpha: strength of the adapters, above 0.

    Raises:
        ValueError: rank or alpha is out of range.
    """
    hidden_size = causal_lm.config.hidden_size
    if not 1 <= rank <= hidden_size:
        raise ValueError(f"LoRA rank must be 1 to {hidden_size} (the hidden size), got {rank}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"LoRA alpha must be a finite number above 0, got {alpha}")
    # "all-linear" leaves out the output embeddings, that is the head.
    scale: Any = alpha  # peft says int, and only divides it by the rank
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules="all-linear")
    inject_adapter_in_model(config, causal_lm)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad = ".base_layer." not in name


def merge_lora(causal_lm: Any) -> Any:
    """Add the adapters' products to the weights of their layers, in place, and drop the adapters.

    Returns:
        The same model, with its stock parameter names and all of them trainable; logits are those
        with the adapters but for rounding.

    Raises:
        ValueError: a merged weight is not finite.
    """
    layers = {n: m for n, m in causal_lm.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        causal_lm.set_submodule(name, layer.get_base_layer())
    del causal_lm.peft_config
    return causal_lm.requires_grad_(True)
