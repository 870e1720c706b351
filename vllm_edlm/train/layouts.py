"""Weight names of block-diffusion checkpoints, and the stock causal LM behind them.

Two layouts exist in the wild and both are served: `efficient_dlm` (`encoder.*` and
`diffusion_head.weight`) and `plain`, the names of transformers (`model.*`, `lm_head.weight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM

Layout = Literal["efficient_dlm", "plain"]

_STOCK_PREFIXES = {"encoder.": "model.", "diffusion_head.": "lm_head."}
_NAMES_SHOWN = 5


def check_layout(layout: str) -> None:
    """Raise `ValueError` for a layout that does not exist."""
    if layout not in get_args(Layout):
        allowed = ", ".join(get_args(Layout))
        raise ValueError(f"unknown weight layout {layout!r}; allowed: {allowed}")


def layout_name(name: str, layout: Layout) -> str:
    """The name in a layout of the tensor that transformers calls `name`."""
    if layout == "plain":
        return name
    return _with_prefix(name, {stock: ours for ours, stock in _STOCK_PREFIXES.items()})


def stock_name(name: str) -> str:
    """What transformers calls the tensor `name` of a checkpoint in either layout."""
    return _with_prefix(name, _STOCK_PREFIXES)


def _with_prefix(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_causal_lm(model: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Load an AR model or a block-diffusion checkpoint, in either layout, as the stock class.

    Args:
        model: a folder or a hub name.
        dtype: of the loaded weights.
        attention: transformers' `attn_implementation`.

    Raises:
        ValueError: the model cannot be read, or it holds other tensors than the stock class, which
            transformers would leave out or fill with random numbers; the message names them.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            # Unsaid, transformers asks on the terminal whether it may run a model's own code.
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attention,
            key_mapping={f"^{ours}": stock for ours, stock in _STOCK_PREFIXES.items()},
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot load the model {model}: {error}") from error
    causal_lm, report = loaded
    for kind, fault in (("missing_keys", "it lacks"), ("unexpected_keys", "not a part of it:")):
        if report[kind]:
            raise ValueError(f"cannot load the model {model}: {fault} {listed(report[kind])}")
    return causal_lm


def listed(names: Iterable[str]) -> str:
    """Names for an error message: in order, the first few of many."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:_NAMES_SHOWN])
    more = len(ordered) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
