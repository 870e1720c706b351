"""The stock transformers decoder as a block-diffusion model: one forward over [x_t | x_0].

Shape legend: N rows, T tokens of the joint sequence, M masked tokens, A clean tokens with a
next-token loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from vllm_edlm.train.attention import attention_inputs
from vllm_edlm.train.joint import IGNORED, predictors
from vllm_edlm.train.loss import cross_entropies, divergences, in_slices, tokens_per_slice
from vllm_edlm.train.masks import Grid
from vllm_edlm.train.objective import Objective

if TYPE_CHECKING:
    from vllm_edlm.train.teacher import Teacher


class TokenLosses(NamedTuple):
    """Losses in nats, fp32, in the order of the batch's labels.

    Attributes:
        masked: [M] of masked tokens, not divided by the masking ratio.
        next: [A] next-token cross entropies of clean tokens; empty without a next-token loss.
    """

    masked: Tensor
    next: Tensor


class BlockDiffusionLM(nn.Module):
    """Wraps a stock causal LM (Qwen3, Qwen2, Llama); parameters and their names stay its own.

    The causal LM's `attn_implementation` is a name from `attention.implementation`. A teacher is
    no submodule: it is neither trained nor saved nor sharded.
    """

    def __init__(
        self, causal_lm: Any, objective: Objective, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.objective = objective
        self.teacher = teacher
        # FSDP shards layer by layer by these names.
        self._no_split_modules = causal_lm._no_split_modules

    def forward(self, batch: dict[str, Tensor]) -> TokenLosses:
        """Losses of a batch from `JointCollator`; logits exist for asked tokens only."""
        hidden = self.hidden_states(batch)
        masked = self._masked_losses(batch, hidden)
        if "next_labels" not in batch:
            return TokenLosses(masked, masked.new_empty(0))
        asked = batch["next_labels"] != IGNORED
        targets = batch["next_labels"][asked]
        return TokenLosses(masked, self._in_slices(self._losses, hidden[asked], targets))

    def hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states [N, T, hidden] of the joint sequences."""
        objective = self.objective
        grid = grid_of(batch, batch["block"], objective)
        return joint_hidden_states(self.causal_lm, batch, grid)

    def _masked_losses(self, batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
        targets, places = batch["labels"][batch["labels"] != IGNORED], predictors(batch)
        inputs = [hidden[places], targets]
        if self.teacher is None:
            return self._in_slices(self._losses, *inputs)
        inputs.append(self.teacher.hidden_states(batch)[places])
        return self._in_slices(self._distilled_losses, *inputs)

    def _in_slices(self, losses: Any, *inputs: Tensor) -> Tensor:
        return in_slices(losses, tokens_per_slice(self.causal_lm.config.vocab_size), *inputs)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(self.causal_lm.get_output_embeddings()(hidden), targets)

    def _distilled_losses(self, hidden: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        assert self.teacher is not None
        weight = self.objective.distillation_weight
        logits = self.causal_lm.get_output_embeddings()(hidden)
        own, taught = cross_entropies(logits, targets), self.teacher.logits(taught)
        return (1 - weight) * own + weight * divergences(taught, logits)


def grid_of(batch: dict[str, Tensor], block: Tensor, objective: Objective) -> Grid:
    """The attention grid of a batch with blocks numbered by `block`."""
    return Grid(
        batch["copy"],
        batch["document"],
        block,
        batch["position_ids"],
        objective.pattern,
        objective.causal_clean,
    )


def joint_hidden_states(causal_lm: Any, batch: dict[str, Tensor], grid: Grid) -> Tensor:
    """Last hidden states [N, T, hidden] of a stock causal LM that attends by the grid."""
    output = causal_lm.base_model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **attention_inputs(causal_lm.config._attn_implementation, grid),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
