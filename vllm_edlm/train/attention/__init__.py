"""The ways to compute a joint sequence's attention in a stock transformers decoder.

Each is a name for transformers' `attn_implementation`; model code stays as it is. FlexAttention is
transformers' own; the other two are registered here through its `AttentionInterface`. They get the
mask through keyword arguments that the decoder hands down to its attention layers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface

from vllm_edlm.train.attention import sdpa, xformers
from vllm_edlm.train.masks import Grid, flex_mask

ATTENTIONS = ("auto", "flex", "sdpa", "xformers")

FLEX = "flex_attention"
# torch 2.13 runs FlexAttention on a CPU too, but without a backward pass.
_FLEX_DEVICES = ("cuda", "xpu")

AttentionInterface.register(sdpa.NAME, sdpa.attention)
AttentionInterface.register(xformers.NAME, xformers.attention)


def implementation(attention: str, device: torch.device) -> str:
    """The `attn_implementation` that trains on `device`: `auto` is flex if it can, else sdpa.

    Raises ValueError if `attention` is none of `ATTENTIONS` or cannot train there.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if attention == "auto":
        attention = "flex" if device.type in _FLEX_DEVICES else "sdpa"
    if attention == "flex":
        _require_device(attention, device, _FLEX_DEVICES)
        return FLEX
    if attention == "xformers":
        _require_device(attention, device, ("cuda",))
        _require_xformers()
        return xformers.NAME
    return sdpa.NAME


def _require_device(attention: str, device: torch.device, allowed: tuple[str, ...]) -> None:
    if device.type not in allowed:
        raise ValueError(
            f"attention {attention!r} trains on {' or '.join(allowed)} only, not on "
            f"{device.type}; sdpa trains everywhere"
        )


def _require_xformers() -> None:
    if find_spec("xformers") is None:
        raise ValueError(
            "attention 'xformers' needs the package xformers: install vllm-edlm with its extra "
            "'xformers'"
        )


def attention_inputs(implementation: str, grid: Grid) -> dict[str, Any]:
    """What the stock base model's forward needs besides tokens and positions, as keywords.

    Made once per forward and shared by all layers. Raises ValueError if `implementation` is not a
    name that `implementation()` returns.
    """
    if implementation == FLEX:
        return {"attention_mask": flex_mask(grid)}
    if implementation == sdpa.NAME:
        return sdpa.inputs(grid)
    if implementation == xformers.NAME:
        return xformers.inputs(grid)
    raise ValueError(
        f"attn_implementation {implementation!r} knows no joint sequences; use one of "
        f"{', '.join((FLEX, sdpa.NAME, xformers.NAME))}"
    )
