"""A slow, obvious block-diffusion decoder: the meaning against which the engine is tested.

Batch of one, no KV cache: every denoise step runs the whole sequence again under a dense
attention mask. Nothing here is shared with the package under test.

Shapes: T tokens, V vocabulary, M masked positions.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from oracle_model import OracleModel
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Which block a position belongs to: a fixed grid, or a prompt-wide block and then a grid."""

    block_length: int
    prompt_attention: str
    prompt_length: int

    @property
    def origin(self) -> int:
        """The position at which the grid of generated blocks begins."""
        return {"block_causal": 0, "bidirectional": self.prompt_length}[self.prompt_attention]

    def index(self, position: int) -> int:
        """Block index of a position; -1 stands for the whole of a bidirectional prompt."""
        return (position - self.origin) // self.block_length if position >= self.origin else -1

    def open_block(self, known: int, max_model_len: int) -> range:
        """Positions of the block that holds the first unknown position."""
        start = self.origin + self.index(known) * self.block_length
        return range(start, min(start + self.block_length, max_model_len))

    def mask(self, length: int) -> Tensor:
        """Attention mask [T, T]: a position sees its own block and every earlier one."""
        index = torch.tensor([self.index(position) for position in range(length)])
        return index[:, None] >= index[None, :]


@dataclass
class OracleResult:
    """What one request must yield."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    denoise_steps: list[int] = field(default_factory=list)
    """Forwards spent on each generated block, the abandoned last one included."""
    emitted: list[list[int]] = field(default_factory=list)
    """Tokens emitted by each forward, empty where the known run did not grow."""
    revealed: list[int] = field(default_factory=list)
    """Number of positions revealed by each forward."""
    masked: list[int] = field(default_factory=list)
    """Number of masked positions before each forward."""


def choose_reveals(
    confidence: Sequence[float], threshold: float, step: int, max_steps: int
) -> set[int]:
    """Indices (into the masked positions, in order) revealed by one denoise step.

    The rule: all at or above the threshold, at least the most confident one. Besides, the
    ceil(masked / steps left) most confident ones. Ties go to the lowest position.
    """
    ranked = sorted(range(len(confidence)), key=lambda i: (-confidence[i], i))
    by_rule = {i for i in ranked if confidence[i] >= threshold} or {ranked[0]}
    by_schedule = ranked[: math.ceil(len(ranked) / (max_steps - step))]
    return by_rule | set(by_schedule)


def predict(logits: Tensor, mask_token_id: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their probabilities, M each, from logits [M, V].

    The mask token is never chosen; the softmax is over the whole vocabulary all the same.
    """
    allowed = logits.clone()
    allowed[:, mask_token_id] = -math.inf
    # max over ids in order: the lowest id wins ties.
    tokens = [max(range(len(row)), key=row.__getitem__) for row in allowed.tolist()]
    probability = logits.softmax(-1)
    return tokens, [probability[i, token].item() for i, token in enumerate(tokens)]


@dataclass
class _Decoder:
    """One request being decoded: its settings, the known tokens and the result so far."""

    model: OracleModel
    blocks: Blocks
    mask_token_id: int
    threshold: float
    max_steps: int
    max_model_len: int
    stops: set[int]
    limit: int
    known: list[int]
    result: OracleResult = field(default_factory=OracleResult)

    def run_block(self) -> None:
        """Denoise the open block until it is complete or the request is finished."""
        positions = self.blocks.open_block(len(self.known), self.max_model_len)
        before, tail = self.known[: positions.start], self.known[positions.start :]
        canvas = [*tail, *[None] * (len(positions) - len(tail))]
        self.result.denoise_steps.append(0)
        for step in range(self.max_steps):
            self._denoise(before, canvas, step)
            self._emit(before, canvas)
            if self.result.finish_reason or None not in canvas:
                return

    def _denoise(self, before: list[int], canvas: list[int | None], step: int) -> None:
        """One forward over everything before the open block and its canvas; reveals in place."""
        inputs = before + [self.mask_token_id if token is None else token for token in canvas]
        masked = [i for i, token in enumerate(canvas) if token is None]
        logits = self.model.logits(torch.tensor(inputs), self.blocks.mask(len(inputs)))
        rows = logits[[len(before) + i for i in masked]]
        tokens, confidence = predict(rows, self.mask_token_id)
        chosen = choose_reveals(confidence, self.threshold, step, self.max_steps)
        for index in chosen:
            canvas[masked[index]] = tokens[index]
        self.result.denoise_steps[-1] += 1
        self.result.masked.append(len(masked))
        self.result.revealed.append(len(chosen))

    def _emit(self, before: list[int], canvas: list[int | None]) -> None:
        """Extend `known` by the new part of the known run, the stop rules seeing each token."""
        self.result.emitted.append([])
        for token in canvas[len(self.known) - len(before) :]:
            if token is None or self.result.finish_reason:
                return
            self.known.append(token)
            self.result.emitted[-1].append(token)
            self.result.token_ids.append(token)
            self._check_stop(token)

    def _check_stop(self, token: int) -> None:
        if token in self.stops:
            self.result.finish_reason = "stop"
        elif len(self.result.token_ids) == self.limit:
            self.result.finish_reason = "length"


@torch.inference_mode()
def generate(
    model: OracleModel,
    prompt_ids: Sequence[int],
    *,
    block_length: int,
    mask_token_id: int,
    prompt_attention: str,
    max_tokens: int,
    max_model_len: int,
    threshold: float = 0.9,
    max_steps: int | None = None,
    eos_token_id: int | None = None,
    stop_token_ids: Collection[int] = (),
    ignore_eos: bool = False,
) -> OracleResult:
    """Decode one request greedily, block after block; ids in, ids and their cost out."""
    decoder = _Decoder(
        model=model,
        blocks=Blocks(block_length, prompt_attention, len(prompt_ids)),
        mask_token_id=mask_token_id,
        threshold=threshold,
        max_steps=max_steps or block_length,
        max_model_len=max_model_len,
        stops={*stop_token_ids, *([] if ignore_eos or eos_token_id is None else [eos_token_id])},
        limit=min(max_tokens, max_model_len - len(prompt_ids)),
        known=list(prompt_ids),
    )
    while decoder.result.finish_reason is None:
        decoder.run_block()
    return decoder.result
