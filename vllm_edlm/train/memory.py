"""How much memory a process needs at the peak of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vllm_edlm.train.loss import tokens_per_slice
from vllm_edlm.train.step_cost import StepCost
from vllm_edlm.train.trainer import ConversionTrainer

_FP32 = 4  # bytes
# Logits of a slice, their log-softmax and their gradient exist together in the backward pass.
_LOGITS_COPIES = 3


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights, gradients, optimizer: in fp32; FSDP shards them.
        gathered: of the weights, what FSDP has whole at a time: embeddings, head and two layers.
        teacher: weights of the teacher, which are never sharded.
        activations: as the training is set up.
        logits: of masked tokens, in the slices that they are computed in.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    teacher: int
    activations: int
    logits: int

    @property
    def own(self) -> int:
        """What every process holds, however the model is spread."""
        return self.teacher + self.activations + self.logits

    @property
    def alone(self) -> int:
        """The sum for a single process."""
        return self.weights + self.gradients + self.optimizer + self.own

    @property
    def ddp(self) -> int:
        """The sum for each of several processes, with DDP's buckets for gradients."""
        return self.alone + self.gradients

    def fsdp(self, processes: int) -> int:
        """The sum for each of so many processes with FSDP."""
        sharded = self.weights + self.gradients + self.optimizer
        return sharded // processes + self.gathered + self.own


def memory(trainer: ConversionTrainer, cost: StepCost) -> Memory:
    """Add up what one process holds at the peak of a step."""
    model = trainer.model
    causal_lm, config = model.causal_lm, model.causal_lm.config
    parameters, trainable = count(causal_lm), count(causal_lm, trained=True)
    layers = count(causal_lm.base_model.layers)
    gathered = parameters - layers + 2 * layers // config.num_hidden_layers
    sliced = min(cost.masked_tokens, tokens_per_slice(config.vocab_size))
    checkpointed = causal_lm.is_gradient_checkpointing
    return Memory(
        weights=_FP32 * parameters,
        gradients=_FP32 * trainable,
        optimizer=2 * _FP32 * trainable,
        gathered=gathered * (2 if trainer.args.bf16 else _FP32),
        teacher=_bytes(model.teacher.causal_lm) if model.teacher else 0,
        activations=cost.activations_checkpointed if checkpointed else cost.activations,
        logits=_LOGITS_COPIES * _FP32 * sliced * config.vocab_size,
    )


def count(module: nn.Module, trained: bool = False) -> int:
    """Number of parameters, of all of them or of those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
