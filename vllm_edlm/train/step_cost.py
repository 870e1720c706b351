"""What one training step costs on this machine: memory kept for its backward pass, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vllm_edlm.train.joint import IGNORED
from vllm_edlm.train.trainer import ConversionTrainer

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class StepCost:
    """Measured on the first batch of one process, without other processes and without optimizer.

    Attributes:
        seconds: of a forward and backward pass.
        joint_tokens: tokens in it, of noisy copies and clean half.
        masked_tokens: how many of these have logits.
        activations: bytes that the backward pass finds kept, copies of weights in the precision of
            the computation included.
        activations_checkpointed: the same with gradient checkpointing, together with one layer's
            that are computed anew.
    """

    seconds: float
    joint_tokens: int
    masked_tokens: int
    activations: int
    activations_checkpointed: int


def measure(trainer: ConversionTrainer) -> StepCost:
    """Run the first batch forward and backward; weights do not change, gradients are dropped.

    Raises:
        ValueError: the batch does not fit into the device's memory.
    """
    trainer.model.to(trainer.args.device).train()
    batches = iter(trainer.get_train_dataloader())
    [batch], counts = trainer.get_batch_samples(batches, 1, trainer.args.device)

    def loss() -> Tensor:
        with trainer.accelerator.autocast():
            result: Tensor = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
        return result

    try:
        activations = _activations(trainer, loss)
        seconds = _seconds(trainer, loss)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a batch of {trainer.args.train_batch_size} rows of {trainer.row_length} tokens does "
            f"not fit into memory: {error}"
        ) from error
    masked = int((batch["labels"] != IGNORED).sum())
    return StepCost(seconds, batch["tokens"].numel(), masked, *activations)


def _activations(trainer: ConversionTrainer, loss: Loss) -> tuple[int, int]:
    """Bytes kept without and with gradient checkpointing, without torch.compile."""
    causal_lm = trainer.model.causal_lm
    checkpointed = causal_lm.is_gradient_checkpointing
    weights = list(trainer.model.parameters())
    with torch.compiler.set_stance("force_eager"):
        causal_lm.gradient_checkpointing_disable()
        plain = kept_bytes(loss, weights)
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        layer_inputs = kept_bytes(loss, weights)
    if not checkpointed:
        causal_lm.gradient_checkpointing_disable()
    return plain, layer_inputs + plain // causal_lm.config.num_hidden_layers


def kept_bytes(run: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `run()`, besides the weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()  # lives until all is counted, and with it what it keeps
    total = sum(kept.values())
    del result
    return total


def _seconds(trainer: ConversionTrainer, loss: Loss) -> float:
    """Time of the second of two passes: the first may compile and allocate."""
    for _ in range(2):
        start = time.perf_counter()
        trainer.accelerator.backward(loss())
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
        trainer.model.zero_grad()
    return seconds
