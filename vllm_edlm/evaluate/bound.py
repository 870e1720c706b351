"""A lower bound of a text's log-likelihood, from the training objective.

For a block with n tokens to score, log p >= E_k E_S [ n/k * sum over b in S of log p(x_b | rest) ],
k uniform in 1..n, S a uniform subset of k tokens, which are masked. It is Eq. 1 of arXiv 2512.14067
with the number of masked tokens in place of the ratio that it is drawn from. Blocks add up, each
given the clean blocks before it. A lone token is always masked, so its bound is exact.

The block's positions behind the text are masked in every sample, as they are in the chain.

Shape legend: S samples, L tokens of the text in whole blocks, K blocks, B block length, M masked
positions of all samples, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_edlm.options import Options
from vllm_edlm.train.attention import implementation
from vllm_edlm.train.joint import IGNORED, join, predictors
from vllm_edlm.train.layouts import load_causal_lm
from vllm_edlm.train.model import grid_of, joint_hidden_states
from vllm_edlm.train.noise import Corruption
from vllm_edlm.train.objective import Objective

# Tokens of the samples in one forward.
_SAMPLES_TOKENS = 2048


def draw_masks(
    scored_L: Tensor, block_length: int, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Which scored positions each sample masks, and their share of the block's scored ones.

    The numbers of masks of a block's samples are spread evenly over 1..n, which leaves the
    distribution of each as it is.

    Returns:
        masked [S, L] bool and ratio [S, L].
    """
    generator = torch.Generator().manual_seed(seed)
    scored_KB = scored_L.unflatten(0, (-1, block_length))
    count_K = scored_KB.sum(dim=1).clamp(min=1)
    order_SK = torch.rand(samples, len(count_K), generator=generator).argsort(dim=0)
    place_SK = (order_SK + torch.rand(len(count_K), generator=generator)) / samples
    masks_SK = (place_SK * count_K).long().clamp(max=count_K - 1) + 1
    noise_SKB = torch.rand(samples, *scored_KB.shape, generator=generator)
    rank_SKB = noise_SKB.masked_fill(~scored_KB, 2.0).argsort(dim=-1).argsort(dim=-1)
    masked_SKB = (rank_SKB < masks_SK[..., None]) & scored_KB
    return masked_SKB.flatten(1), (masks_SK / count_K).repeat_interleave(block_length, dim=1)


class Bound:
    """Scores texts by the training objective: clean context, one grid of blocks."""

    def __init__(self, causal_lm: Any, options: Options, samples: int = 32, seed: int = 0) -> None:
        """Take a model whose attention knows joint sequences.

        Raises:
            ValueError: the model sees prompts otherwise than training does, or there would be no
                sample.
        """
        if options.blocks_follow_prompt:
            raise ValueError(
                "likelihood=bound needs prompt_attention 'block_causal' or 'causal_grid', on "
                f"whose blocks models are trained, got {options.prompt_attention!r}; use "
                "likelihood=chain"
            )
        if samples < 1:
            raise ValueError(f"bound_samples must be at least 1, got {samples}")
        self.causal_lm = causal_lm
        self.objective = Objective(
            options.block_length,
            options.mask_token_id,
            token_shift=options.token_shift,
            # Of a joint model; the weight itself is not looked at.
            ar_loss_weight=float(options.has_causal_past),
        )
        self.samples = samples
        self.seed = seed

    @classmethod
    def load(
        cls, model: str, options: Options, dtype: torch.dtype, samples: int, seed: int
    ) -> "Bound":
        """Load a checkpoint, to the GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        causal_lm = load_causal_lm(model, dtype, implementation("sdpa", device))
        return cls(causal_lm.eval().to(device), options, samples, seed)

    def likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The bound, in nats, and whether every masked token was the likeliest in its sample."""
        if not continuation:
            return 0.0, True
        row = text_row(context, continuation, self.objective)
        scored, block_length = row["in_loss"][0], self.objective.block_length
        masked, ratio = draw_masks(scored, block_length, self.samples, self.seed)
        total, greedy = 0.0, True
        for part in self._parts(scored):
            logprobs_M, is_best_M = self.conditionals(row, masked[part])
            total += (logprobs_M / ratio[part][masked[part]]).sum().item()
            greedy = greedy and bool(is_best_M.all())
        return total / self.samples, greedy

    def _parts(self, scored_L: Tensor) -> Iterator[slice]:
        """Samples that run together."""
        step = max(1, _SAMPLES_TOKENS // int(scored_L.sum()))
        return (slice(start, start + step) for start in range(0, self.samples, step))

    @torch.inference_mode()
    def conditionals(self, row: dict[str, Tensor], masked_SL: Tensor) -> tuple[Tensor, Tensor]:
        """Every masked token of a text, given what its sample leaves unmasked.

        Args:
            row: from `text_row`.

        Returns:
            log-probability [M] and whether the token is the likeliest one [M], sample by sample,
            on the CPU.
        """
        unit = torch.ones(1, masked_SL.shape[1])
        corruptions = [Corruption(masked[None], unit) for masked in masked_SL]
        batch = join(row, corruptions, self.objective, self.objective.block_length)
        batch = {name: tensor.to(self.causal_lm.device) for name, tensor in batch.items()}
        target_M = batch["labels"][batch["labels"] != IGNORED]
        logits_MV = self._logits(batch)
        logprobs_M = logits_MV.log_softmax(dim=-1).gather(1, target_M[:, None])[:, 0]
        logits_MV[:, self.objective.mask_token_id] = -torch.inf
        return logprobs_M.cpu(), (logits_MV.argmax(dim=-1) == target_M).cpu()

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """fp32 logits [M, V] of the masked tokens."""
        grid = grid_of(batch, batch["block"], self.objective)
        hidden = joint_hidden_states(self.causal_lm, batch, grid)
        logits: Tensor = self.causal_lm.get_output_embeddings()(hidden[predictors(batch)])
        return logits.float()


def text_row(
    context: Sequence[int], continuation: Sequence[int], objective: Objective
) -> dict[str, Tensor]:
    """A text as a batch of one row [1, L]: its continuation in the loss, masks behind it."""
    text = [*context, *continuation]
    missing = -len(text) % objective.block_length
    tokens = torch.tensor([[*text, *[objective.mask_token_id] * missing]])
    position = torch.arange(tokens.shape[1])[None]
    return {
        "tokens": tokens,
        "in_loss": (position >= len(context)) & (position < len(text)),
        "position_ids": position,
        "document_ids": torch.zeros_like(position),
    }
