"""Rows of documents -> the joint sequences that one forward runs.

A joint sequence holds the noisy copies of a row and, where the attention pattern has one, its clean
half last: with one copy the paper's [x_t | x_0], T = 2L. What changes neither loss nor gradient is
left out, and several copies share one clean half, which costs less than another row would.

A batch is a flat dictionary of tensors [N, T]:
  - `tokens`, and `position_ids` within the document;
  - `copy`, `document`, `block`: with the position, where attention takes the token to stand;
  - `labels`: what a masked token was, `IGNORED` elsewhere; `p_mask`: its masking ratio;
  - `source`: index of the hidden state that predicts the token;
  - with a next-token loss `next_labels`: the token after a clean one, `IGNORED` elsewhere.

Shape legend: N rows, L tokens of a row, T tokens of the joint sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edlm.train.masks import CLEAN
from vllm_edlm.train.noise import Corruption, corrupt, draw, numbers_needed
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.packing import NO_DOCUMENT

IGNORED = -100  # a label that asks for nothing, as in torch's cross entropy


@dataclass(frozen=True)
class JointCollator:
    """Makes a batch of joint sequences of rows from `PackedRows`; corruption is drawn here.

    Noise and block length follow from the rows' `sample` alone, so neither the number of
    processes, nor gradient accumulation, nor a resume changes them.

    Attributes:
        objective: what is learned.
        steps: optimizer steps of the whole training.
        rows_per_step: rows of an optimizer step, of all processes together.
    """

    objective: Objective
    steps: int
    rows_per_step: int

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate rows of one optimizer step."""
        step = int(rows[0]["sample"]) // self.rows_per_step
        block_length = self.objective.block_length_at(step, self.steps)
        return corrupted(rows, self.objective, block_length)


def corrupted(
    rows: list[dict[str, Tensor]], objective: Objective, block_length: int
) -> dict[str, Tensor]:
    """Joint sequences of rows from `PackedRows`, in blocks of the given length."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    corruptions = corruptions_of(batch, objective, block_length)
    return join(batch, corruptions, objective, block_length)


def corruptions_of(
    batch: dict[str, Tensor], objective: Objective, block_length: int
) -> list[Corruption]:
    """One corruption per noise copy of a stacked batch of rows."""
    in_loss = batch["in_loss"]
    if objective.token_shift:  # nothing stands before a document's first token
        in_loss = in_loss & (batch["position_ids"] > 0)
    samples = batch["sample"].tolist()
    numbers = numbers_needed(in_loss.shape[1], block_length)
    return [
        corrupt(
            objective.noise,
            draw(objective.seed, samples, copy, numbers),
            in_loss,
            batch["document_ids"],
            block_length,
            objective.half_life_ratio,
        )
        for copy in range(objective.noise_copies)
    ]


def join(
    batch: dict[str, Tensor],
    corruptions: list[Corruption],
    objective: Objective,
    block_length: int,
    drop_unused: bool = True,
) -> dict[str, Tensor]:
    """Lay out noisy copies and clean tokens of a stacked batch of rows as joint sequences.

    With `drop_unused=False` every token of the rows stands in every copy and in the clean half.
    """
    noisy, clean = _kept_columns(batch, objective, block_length, drop_unused)
    parts = [
        _noisy_part(batch, noisy, copy, corruption, objective)
        for copy, corruption in enumerate(corruptions, start=CLEAN + 1)
    ]
    columns = [noisy] * len(parts)
    if objective.has_clean_half:
        parts.append(_clean_part(batch, clean, objective))
        columns.append(clean)
    joint = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    joint["block"] = joint["position_ids"] // block_length
    joint["source"] = _own_index(joint["tokens"])
    if objective.token_shift:
        starts_block = joint["position_ids"] % block_length == 0
        joint["source"] = _shifted(starts_block, torch.cat(columns, dim=1), clean, objective)
    return joint


def _kept_columns(
    batch: dict[str, Tensor], objective: Objective, block_length: int, drop_unused: bool
) -> tuple[Tensor, Tensor]:
    """Columns [N, kept] of the noisy and of the clean tokens that a forward needs."""
    in_loss, document = batch["in_loss"], batch["document_ids"]
    if not drop_unused:
        everything = _columns(torch.ones_like(in_loss))
        return everything, everything
    exists = document != NO_DOCUMENT
    if not objective.has_clean_half:
        return _columns(exists), _columns(torch.zeros_like(exists))
    noisy = in_loss.unflatten(1, (-1, block_length)).any(-1)
    noisy = noisy.repeat_interleave(block_length, dim=1)
    if objective.causal_clean or objective.distillation_weight:
        # Last blocks predict next tokens, and a teacher's blocks end inside of them.
        return _columns(noisy), _columns(exists)
    # Otherwise a clean token serves only later blocks of its document.
    clean = torch.zeros_like(exists)
    clean[:, :-block_length] = document[:, :-block_length] == document[:, block_length:]
    return _columns(noisy), _columns(clean & exists)


def _columns(wanted_NL: Tensor) -> Tensor:
    """Columns of the wanted tokens, in order; rows with fewer take harmless others along."""
    count = int(wanted_NL.sum(dim=1).max())
    order = wanted_NL.int().argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def _noisy_part(
    batch: dict[str, Tensor],
    columns: Tensor,
    copy: int,
    corruption: Corruption,
    objective: Objective,
) -> dict[str, Tensor]:
    tokens, masked = batch["tokens"], corruption.masked
    part = {
        "tokens": tokens.masked_fill(masked, objective.mask_token_id),
        "labels": tokens.masked_fill(~masked, IGNORED),
        "p_mask": corruption.p_mask,
        "copy": torch.full_like(tokens, copy),
    }
    if objective.ar_loss_weight:
        part["next_labels"] = torch.full_like(tokens, IGNORED)
    return _gathered(batch, part, columns)


def _clean_part(
    batch: dict[str, Tensor], columns: Tensor, objective: Objective
) -> dict[str, Tensor]:
    tokens = batch["tokens"]
    part = {
        "tokens": tokens,
        "labels": torch.full_like(tokens, IGNORED),
        "p_mask": torch.ones_like(tokens, dtype=torch.float32),
        "copy": torch.full_like(tokens, CLEAN),
    }
    if objective.ar_loss_weight:
        part["next_labels"] = _next_labels(batch)
    return _gathered(batch, part, columns)


def _gathered(
    batch: dict[str, Tensor], part: dict[str, Tensor], columns: Tensor
) -> dict[str, Tensor]:
    """The kept columns of every field of one copy, each [N, kept]."""
    places = {"position_ids": batch["position_ids"], "document": batch["document_ids"]}
    return {name: value.gather(1, columns) for name, value in (part | places).items()}


def _next_labels(batch: dict[str, Tensor]) -> Tensor:
    """The token after each, [N, L], where it is of the same document and in the loss."""
    tokens, document = batch["tokens"], batch["document_ids"]
    labels = torch.full_like(tokens, IGNORED)
    asked = (document[:, :-1] == document[:, 1:]) & batch["in_loss"][:, 1:]
    labels[:, :-1] = tokens[:, 1:].masked_fill(~asked, IGNORED)
    return labels


def predictors(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Row and place [M] of the hidden state that predicts each masked token of a joint batch."""
    row, column = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
    return row, batch["source"][row, column]


def _own_index(tokens_NT: Tensor) -> Tensor:
    return torch.arange(tokens_NT.shape[1]).expand_as(tokens_NT)


def _shifted(
    starts_block_NT: Tensor, columns_NT: Tensor, clean: Tensor, objective: Objective
) -> Tensor:
    """Where the position before each token stands, [N, T].

    Inside a block that is the token before in the same copy. A block's first token is predicted by
    the clean token before it, as served: the commit of a block predicts what the next begins with.
    """
    before = (_own_index(columns_NT) - 1).clamp(min=0)
    if not objective.has_clean_half:
        return before
    tokens = columns_NT.shape[1]
    clean_before = tokens - clean.shape[1] + torch.searchsorted(clean, columns_NT - 1)
    return torch.where(starts_block_NT, clean_before.clamp(max=tokens - 1), before)
