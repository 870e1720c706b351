"""LoRA adapters of a block-diffusion step.

vLLM maps every token of a step to its request's adapter, which holds here too. It falls short
in two places. It maps one row of logits per request to an adapter, where a request here has a
row for each open position. And its kernels for the CPU take "no adapter", index -1, for the
last adapter, as indexing from the end does. Upstream shape: patches/0005.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class PunicaWrapperMaskedCPU(PunicaWrapperCPU):
    """LoRA on the CPU where a row without an adapter gets none: its input is zeroed.

    Shapes: T rows, D input size, R rank.
    """

    def add_lora_linear(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the adapters' product with `x` [T, D], a row per token, to `y` in place."""
        super().add_lora_linear(y, _mask(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the adapters' product with `x` [T, R], a row per token, to `y` in place."""
        super().add_lora_embedding(y, _mask(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the adapters' product with `x` [T, D], a row of logits each, to `y` in place."""
        super().add_lora_logits(y, _mask(x, self.sampler_indices), *args, **kwargs)


def _mask(x: Tensor, adapter_T: Tensor) -> Tensor:
    return x.masked_fill((adapter_T < 0).unsqueeze(-1), 0)


def install_lora_mask(model: nn.Module) -> None:
    """Give rows without an adapter none, in the LoRA layers of this model alone."""
    for wrapper in _wrappers(model):
        if type(wrapper) is PunicaWrapperCPU:
            wrapper.__class__ = PunicaWrapperMaskedCPU


def map_logits_rows(model: nn.Module, logits_indices: Tensor) -> None:
    """Give each row of logits the adapter of its token.

    Args:
        model: any model; nothing is done to one that is served without LoRA.
        logits_indices: [T] for each row of logits, its token in the step.
    """
    num_rows = len(logits_indices)
    for wrapper in _wrappers(model) if num_rows else ():
        rows_T = wrapper.token_lora_indices[logits_indices]
        wrapper._sampler_indices[:num_rows] = rows_T
        wrapper.indices_len[1] = num_rows
        if (kernel_rows := getattr(wrapper, "prompt_mapping_meta", None)) is not None:
            kernel_rows.prepare_tensors(rows_T)  # Triton's kernels keep a mapping of their own.


def _wrappers(model: nn.Module) -> Iterable[PunicaWrapperBase]:
    """vLLM's LoRA metadata; it leaves its manager in the model that it has wrapped."""
    manager = getattr(model, "lora_manager", None)
    return manager.punica_wrapper_mapping.values() if manager is not None else ()
