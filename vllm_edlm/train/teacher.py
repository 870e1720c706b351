"""A frozen block-diffusion model whose predictions another one learns, from the same masked tokens.

Typically a model of short blocks, which sees more clean tokens before each block of its own grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from vllm_edlm.family import normalise
from vllm_edlm.options import CAUSAL_ATTENTIONS
from vllm_edlm.train.layouts import load_causal_lm
from vllm_edlm.train.masks import Grid
from vllm_edlm.train.model import joint_hidden_states
from vllm_edlm.train.objective import Objective


class Teacher:
    """Runs joint sequences made for a student; every process holds all of its weights.

    Args:
        causal_lm: a stock causal LM, on any device; it moves to where the batches are.
        block_length: of its own grid.
        causal_clean: whether its clean tokens attend token-causally.
    """

    def __init__(self, causal_lm: Any, block_length: int, causal_clean: bool = False) -> None:
        self.causal_lm = causal_lm.requires_grad_(False).eval()
        self._block_length = block_length
        self._causal_clean = causal_clean

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states [N, T, hidden] of a batch from `JointCollator`."""
        self.causal_lm.to(batch["tokens"].device)
        position = batch["position_ids"]
        block = position // self._block_length
        grid = Grid(
            batch["copy"], batch["document"], block, position, causal_clean=self._causal_clean
        )
        return joint_hidden_states(self.causal_lm, batch, grid)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., hidden]."""
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        return logits


def load_teacher(
    name: str, tokenizer: Any, objective: Objective, dtype: torch.dtype, attention: str
) -> Teacher:
    """Load a block-diffusion checkpoint as the teacher of a model with this tokenizer.

    Args:
        name: a folder or a hub name.
        tokenizer: the student's.
        objective: the student's.
        dtype: of the teacher's weights.
        attention: a name from `attention.implementation`.

    Raises:
        ValueError: it cannot be loaded, has another vocabulary or mask token, or was trained with
            token shift or with bidirectional prompts; the message names what.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"cannot load the teacher {name}: {error}") from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the teacher {name} has another vocabulary than the model")
    _read_family(config, name)
    _check(config, name, objective)
    return Teacher(
        load_causal_lm(name, dtype, attention),
        config.block_size,
        causal_clean=config.prompt_attention in CAUSAL_ATTENTIONS,
    )


def _read_family(config: Any, name: str) -> None:
    try:
        normalise(config)
    except (StopIteration, ValueError) as error:
        raise ValueError(
            f"the teacher {name} is no block-diffusion checkpoint that can be read: {error}"
        ) from error


def _check(config: Any, name: str, objective: Objective) -> None:
    allowed = {
        "mask_token_id": (objective.mask_token_id,),
        "token_shift": (False,),
        "prompt_attention": ("block_causal", *CAUSAL_ATTENTIONS),
    }
    for key, values in allowed.items():
        value = getattr(config, key)
        if value not in values:
            names = " or ".join(map(str, values))
            raise ValueError(f"{key} of the teacher {name} must be {names}, got {value}")
