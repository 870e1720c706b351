"""Does an export compute what the trainer computed? Logits of masked tokens, side by side.

Shape legend: M masked tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from vllm_edlm.train.joint import IGNORED, corrupted, predictors
from vllm_edlm.train.layouts import load_causal_lm
from vllm_edlm.train.loss import tokens_per_slice
from vllm_edlm.train.model import BlockDiffusionLM
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.served_config import checkpoint_config

# Largest difference of two logits that fp32 arithmetic in another order explains.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far two models' logits lie apart.

    Attributes:
        largest: absolute difference.
        mean: absolute difference.
        equal_argmax: share of tokens, 0 to 1, for which both find the same token the likeliest.
    """

    largest: float
    mean: float
    equal_argmax: float

    def __str__(self) -> str:
        return (
            f"largest {self.largest:.2g}, mean {self.mean:.2g}, "
            f"same likeliest token {self.equal_argmax:.1%}"
        )


@dataclass(frozen=True)
class Check:
    """Logits of an export against those of the model that was trained.

    Attributes:
        dtype: of the export's weights.
        tokens: masked tokens compared.
        rounded: difference from the trained weights rounded to that type: of arithmetic alone.
        trained: difference from the trained weights: what the rounding costs.
    """

    dtype: torch.dtype
    tokens: int
    rounded: Difference
    trained: Difference

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"logits of {self.tokens} masked tokens differ from the trained weights rounded to "
            f"{dtype} by: {self.rounded}; from the trained weights by: {self.trained}"
        )


class _Answers(NamedTuple):
    """What a model predicts: hidden states [M, H] and the head that makes logits [M, V] of them."""

    hidden: Tensor
    head: Any


@torch.no_grad()
def check(
    directory: Path, causal_lm: Any, objective: Objective, rows: list[dict[str, Tensor]]
) -> Check:
    """Load an export as it was written and compare its logits with the trainer's, in fp32.

    Holds a second model in memory, and puts the given one into evaluation mode.

    Args:
        directory: the export.
        causal_lm: the trained model, whole, its attention one of `attention.implementation`.
        rows: some rows of `PackedRows`; corruption follows from `objective` and their `sample`.

    Raises:
        ValueError: the export cannot be loaded, says something else than `objective`, or computes
            something else than the trained weights rounded to its type; or no token is masked.
    """
    dtype = _checked_dtype(directory, causal_lm.config, objective)
    batch = _batch(rows, objective, causal_lm.device)
    trained = _answers(causal_lm, objective, batch)
    rounded = _answers(_rounded(causal_lm, dtype), objective, batch)
    exported = load_causal_lm(
        str(directory), torch.float32, causal_lm.config._attn_implementation
    ).to(causal_lm.device)
    answers = _answers(exported, objective, batch)
    result = Check(
        dtype,
        len(trained.hidden),
        rounded=_difference(rounded, answers),
        trained=_difference(trained, answers),
    )
    # Not a number is no small difference.
    if not result.rounded.largest <= TOLERANCE:
        raise ValueError(f"the export in {directory} is not the trained model: {result}")
    return result


def _checked_dtype(directory: Path, trained_config: Any, objective: Objective) -> torch.dtype:
    """The type of the export's weights, once its config.json is what it should be."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"there is no export in {directory}: config.json is missing")
    config = AutoConfig.from_pretrained(directory)
    expected = checkpoint_config(trained_config, objective, config.dtype)
    for key in ("block_size", "mask_token_id", "prompt_attention", "token_shift"):
        if (found := getattr(config, key, None)) != expected[key]:
            raise ValueError(
                f"{key} in {directory}/config.json must be {expected[key]}, got {found}"
            )
    dtype: torch.dtype = config.dtype
    return dtype


def _batch(
    rows: list[dict[str, Tensor]], objective: Objective, device: torch.device
) -> dict[str, Tensor]:
    """The rows as joint sequences, blocks of full length whatever the training began with."""
    batch = corrupted(rows, objective, objective.block_length)
    if not (batch["labels"] != IGNORED).any():
        raise ValueError(f"no token of the {len(rows)} rows to check with is masked; give more")
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _rounded(causal_lm: Any, dtype: torch.dtype) -> Any:
    """A copy whose weights have been through `dtype`; buffers, which no export holds, stay."""
    rounded = copy.deepcopy(causal_lm)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return rounded


def _answers(causal_lm: Any, objective: Objective, batch: dict[str, Tensor]) -> _Answers:
    hidden = BlockDiffusionLM(causal_lm, objective).eval().hidden_states(batch)
    return _Answers(hidden[predictors(batch)], causal_lm.get_output_embeddings())


def _difference(one: _Answers, other: _Answers) -> Difference:
    slices = zip(
        *(a.hidden.split(tokens_per_slice(one.head.out_features)) for a in (one, other)),
        strict=True,
    )
    largest, mean, equal = [], [], []
    for ours, theirs in slices:
        logits, others = one.head(ours).float(), other.head(theirs).float()
        gap = (logits - others).abs()
        largest.append(gap.amax(-1))
        mean.append(gap.mean(-1))
        equal.append(logits.argmax(-1) == others.argmax(-1))
    return Difference(
        torch.cat(largest).max().item(),
        torch.cat(mean).mean().item(),
        torch.cat(equal).float().mean().item(),
    )
