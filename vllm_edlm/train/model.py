"""The stock transformers decoder as a block-diffusion model: one forward over [x_t | x_0].

Shape legend: N rows, L tokens of a row, C noisy copies, T tokens of the joint sequence, M masked
tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_edlm.train.data import NO_DOCUMENT
from vllm_edlm.train.loss import diffusion_loss
from vllm_edlm.train.masks import CLEAN, Grid, dense_mask, flex_mask
from vllm_edlm.train.noise import Corruption


class JointSequence(NamedTuple):
    """What one forward runs: noisy copies first, clean tokens last. All but `grid` are [N, T]."""

    tokens: Tensor
    position_ids: Tensor
    targets: Tensor
    masked: Tensor  # bool, False on the clean half
    p_mask: Tensor
    grid: Grid


def join(
    batch: dict[str, Tensor],
    corruptions: list[Corruption],
    mask_token_id: int,
    block_length: int,
    drop_unused: bool = True,
) -> JointSequence:
    """Lay out noisy copies and clean tokens of a batch from `PackedRows` as one sequence.

    With one corruption and `drop_unused=False` this is the paper's [x_t | x_0] with T = 2L. Blocks
    that change neither loss nor gradient may be dropped: noisy blocks without a token in the loss,
    and the last clean block of a document, which nothing attends to. Further corruptions share the
    clean half, which costs less than another row would.
    """
    needed_noisy, needed_clean = _needed(batch, block_length, drop_unused)
    parts = []
    for copy, corruption in enumerate(corruptions, start=CLEAN + 1):
        parts.append(_part(batch, needed_noisy, copy, corruption, mask_token_id, block_length))
    untouched = Corruption(
        torch.zeros_like(batch["in_loss"]), torch.ones_like(batch["tokens"], dtype=torch.float32)
    )
    parts.append(_part(batch, needed_clean, CLEAN, untouched, mask_token_id, block_length))
    fields = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    grid = Grid(*(fields.pop(name) for name in ("copy", "document", "block")))
    return JointSequence(**fields, grid=grid)


def _needed(
    batch: dict[str, Tensor], block_length: int, drop_unused: bool
) -> tuple[Tensor, Tensor]:
    """Column indices [N, kept] of the noisy and of the clean tokens that a forward needs."""
    in_loss, document = batch["in_loss"], batch["document_ids"]
    noisy = in_loss.unflatten(1, (-1, block_length)).any(-1)
    noisy = noisy.repeat_interleave(block_length, dim=1)
    # A clean token serves only later blocks of its document.
    clean = torch.zeros_like(in_loss)
    follows = document[:, :-block_length] == document[:, block_length:]
    clean[:, :-block_length] = follows & (document[:, block_length:] != NO_DOCUMENT)
    if not drop_unused:
        noisy, clean = torch.ones_like(noisy), torch.ones_like(clean)
    return _columns(noisy), _columns(clean)


def _columns(wanted_NL: Tensor) -> Tensor:
    """Columns of the wanted tokens, in order; rows with fewer take harmless others along."""
    count = int(wanted_NL.sum(dim=1).max())
    order = wanted_NL.int().argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def _part(
    batch: dict[str, Tensor],
    columns: Tensor,
    copy: int,
    corruption: Corruption,
    mask_token_id: int,
    block_length: int,
) -> dict[str, Tensor]:
    """The kept columns of one copy, field by field, each [N, kept]."""
    targets, masked = batch["tokens"], corruption.masked
    fields = {
        "tokens": targets.masked_fill(masked, mask_token_id),
        "position_ids": batch["position_ids"],
        "targets": targets,
        "masked": masked,
        "p_mask": corruption.p_mask,
        "copy": torch.full_like(targets, copy),
        "document": batch["document_ids"],
        "block": batch["position_ids"] // block_length,
    }
    return {name: value.gather(1, columns) for name, value in fields.items()}


class BlockDiffusionLM(nn.Module):
    """Wraps a stock causal LM (Qwen3, Qwen2, Llama); parameters and their names stay its own."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, sequence: JointSequence) -> Tensor:
        """Loss of one joint sequence, a scalar in nats; logits exist for masked tokens only."""
        hidden = self.hidden_states(sequence)
        masked = sequence.masked
        logits = self.causal_lm.get_output_embeddings()(hidden[masked])
        return diffusion_loss(logits, sequence.targets[masked], sequence.p_mask[masked])

    def hidden_states(self, sequence: JointSequence) -> Tensor:
        """Last hidden states [N, T, hidden] of the joint sequence."""
        flex = self.causal_lm.config._attn_implementation == "flex_attention"
        mask = flex_mask(sequence.grid) if flex else dense_mask(sequence.grid)
        output = self.causal_lm.base_model(
            input_ids=sequence.tokens,
            attention_mask=mask,
            position_ids=sequence.position_ids,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden
