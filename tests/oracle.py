"""A slow, obvious block-diffusion decoder: the meaning against which the engine is tested.

Batch of one, no KV cache: every denoise step runs the whole sequence again under a dense
attention mask. Nothing here is shared with the package under test. `oracle_sampling` says what
the parameters mean, `oracle_reveal` what the rules reveal.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from oracle_model import OracleModel
from oracle_reveal import DEFAULT_THRESHOLDS, Statistics, choose_reveals
from oracle_sampling import GREEDY, Sampling, candidates, choose, completed, only, process
from torch import Tensor

Grammar = Callable[[Sequence[int]], Collection[int] | None]
"""From the tokens emitted so far to those that may come next; None allows all."""


@dataclass(frozen=True)
class Blocks:
    """Which block a position belongs to: a fixed grid, or a prompt of its own and then a grid."""

    block_length: int
    prompt_attention: str
    prompt_length: int

    @property
    def origin(self) -> int:
        """The position at which the grid of generated blocks begins."""
        on_grid = self.prompt_attention in ("block_causal", "causal_grid")
        return 0 if on_grid else self.prompt_length

    def index(self, position: int) -> int:
        """Block index of a position; -1 stands for the whole of a prompt outside the grid."""
        return (position - self.origin) // self.block_length if position >= self.origin else -1

    def open_block(self, known: int, max_model_len: int) -> range:
        """Positions of the block that holds the first unknown position."""
        start = self.origin + self.index(known) * self.block_length
        return range(start, min(start + self.block_length, max_model_len))

    def steps(self, block: range, asked: int) -> int:
        """Denoise steps that a block may take, where `asked` is said of a whole one."""
        return asked

    def mask(self, length: int) -> Tensor:
        """Attention mask [T, T] of a sequence that ends with its open block.

        A position sees its own block and every earlier one; where prompts are causal, it sees
        its own block whole only in the open one.
        """
        index = torch.tensor([self.index(position) for position in range(length)])
        by_block = index[:, None] >= index[None, :]
        if self.prompt_attention not in ("causal", "causal_grid"):
            return by_block
        in_open_block = (index == index[-1])[:, None]
        return by_block & (in_open_block | torch.ones(length, length, dtype=torch.bool).tril())


@dataclass
class OracleResult:
    """What one request must yield; logits are those of the step that revealed the token."""

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
    raw_logits: list[Tensor] = field(default_factory=list)
    """As the model gave them [V], one per emitted token."""
    processed_logits: list[Tensor] = field(default_factory=list)
    """As the token was chosen from them, without noise [V], one per emitted token."""


@dataclass
class Choice:
    """What a step would put at one masked position, and why."""

    token: int
    statistics: Statistics
    raw: Tensor
    candidates: Tensor


@dataclass
class _Decoder:
    """One request being decoded: its settings, the known tokens and the result so far."""

    model: OracleModel
    blocks: Blocks
    mask_token_id: int
    sampling: Sampling
    rule: str
    threshold: float
    max_steps: int
    max_model_len: int
    token_shift: bool
    min_tokens_ban: set[int]
    stops: set[int]
    limit: int
    grammar: Grammar
    known: list[int]
    result: OracleResult = field(default_factory=OracleResult)

    def run_block(self) -> None:
        """Denoise the open block until it is complete or the request is finished."""
        block = self.blocks.open_block(len(self.known), self.max_model_len)
        sequence = [*self.known, *[None] * (block.stop - len(self.known))]
        chosen: dict[int, Choice] = {}
        self.result.denoise_steps.append(0)
        while None in sequence and self.result.finish_reason is None:
            chosen |= self._denoise(sequence, block, self.result.denoise_steps[-1])
            self._emit(sequence, chosen)
            self.result.denoise_steps[-1] += 1

    def _denoise(self, sequence: list[int | None], block: range, step: int) -> dict[int, Choice]:
        """One forward over everything up to the open block's end; reveals in place."""
        masked = [p for p, token in enumerate(sequence) if token is None]
        logits = self._logits(sequence)
        choices = {p: self._choose(logits[p], p, sequence, step) for p in masked}
        revealed = self._reveals(sequence, choices, block, step)
        for position in revealed:
            sequence[position] = choices[position].token
        self.result.masked.append(len(masked))
        self.result.revealed.append(len(revealed))
        return {position: choices[position] for position in revealed}

    def _logits(self, sequence: Sequence[int | None]) -> Tensor:
        """Logits [T, V]: row p predicts position p."""
        inputs = [self.mask_token_id if token is None else token for token in sequence]
        logits = self.model.logits(torch.tensor(inputs), self.blocks.mask(len(inputs)))
        return logits.roll(1, dims=0) if self.token_shift else logits

    def _choose(
        self, raw: Tensor, position: int, sequence: Sequence[int | None], step: int
    ) -> Choice:
        """The token for one masked position from raw logits [V], and its statistics."""
        prompt_length = self.blocks.prompt_length
        processed = process(
            raw, position, sequence, prompt_length, self.sampling, self.min_tokens_ban
        )
        allowed = self.grammar(self.result.token_ids) if position == len(self.known) else None
        if allowed is not None:
            processed = only(processed, allowed)
        final = candidates(processed, self.mask_token_id, self.sampling)
        counter = position * self.blocks.block_length + step
        token = choose(final, self.sampling.temperature, self.sampling.seed, counter)
        return Choice(token, Statistics.of(processed, token, self.mask_token_id), raw, final)

    def _reveals(
        self,
        sequence: Sequence[int | None],
        choices: dict[int, Choice],
        block: range,
        step: int,
    ) -> list[int]:
        """Positions that the rule reveals, one alone where several would make a bad word."""
        positions = list(choices)
        statistics = [choices[p].statistics for p in positions]
        max_steps = self.blocks.steps(block, self.max_steps)
        order, indices = choose_reveals(self.rule, statistics, self.threshold, step, max_steps)
        revealed, first = {positions[i] for i in indices}, positions[order[0]]
        if self.token_shift and block.start in choices:
            # No later forward of this block holds the position that predicts its start.
            revealed, first = revealed | {block.start}, block.start
        after = [choices[p].token if p in revealed else t for p, t in enumerate(sequence)]
        prompt_length = self.blocks.prompt_length
        output = after[prompt_length:]
        bad = any(completed(self.sampling.bad_words, output, p - prompt_length) for p in revealed)
        return [first] if bad else sorted(revealed)

    def _emit(self, sequence: list[int | None], chosen: dict[int, Choice]) -> None:
        """Extend `known` by the new part of the known run, the stop rules seeing each token.

        From the first token that the grammar refuses, the run is masked again.
        """
        self.result.emitted.append([])
        end = sequence.index(None) if None in sequence else len(sequence)
        for position in range(len(self.known), end):
            allowed = self.grammar(self.result.token_ids)
            if allowed is not None and sequence[position] not in allowed:
                sequence[position:end] = [None] * (end - position)
                return
            self._emit_token(chosen[position])
            if self.result.finish_reason:
                return

    def _emit_token(self, choice: Choice) -> None:
        for tokens in (self.known, self.result.emitted[-1], self.result.token_ids):
            tokens.append(choice.token)
        self.result.raw_logits.append(choice.raw)
        self.result.processed_logits.append(choice.candidates)
        self._check_stop(choice.token)

    def _check_stop(self, token: int) -> None:
        if token in self.stops:
            self.result.finish_reason = "stop"
        elif len(self.result.token_ids) == self.limit:
            self.result.finish_reason = "length"


def _anything(_output: Sequence[int]) -> None:
    """The grammar of a request without one."""


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
    sampling: Sampling = GREEDY,
    rule: str = "confidence",
    threshold: float | None = None,
    max_steps: int | None = None,
    token_shift: bool = False,
    eos_token_id: int | None = None,
    stop_token_ids: Collection[int] = (),
    ignore_eos: bool = False,
    grammar: Grammar = _anything,
    blocks: Blocks | None = None,
) -> OracleResult:
    """Decode one request, block after block; ids in, ids and their cost out.

    `threshold` and `max_steps` default to the rule's own and to the block length; `blocks` to
    blocks of that length.
    """
    eos = set() if eos_token_id is None else {eos_token_id}
    decoder = _Decoder(
        model=model,
        blocks=blocks or Blocks(block_length, prompt_attention, len(prompt_ids)),
        mask_token_id=mask_token_id,
        sampling=sampling,
        rule=rule,
        threshold=DEFAULT_THRESHOLDS[rule] if threshold is None else threshold,
        max_steps=max_steps or block_length,
        max_model_len=max_model_len,
        token_shift=token_shift,
        min_tokens_ban={*stop_token_ids} | eos,
        stops={*stop_token_ids} | (set() if ignore_eos else eos),
        limit=min(max_tokens, max_model_len - len(prompt_ids)),
        grammar=grammar,
        known=list(prompt_ids),
    )
    while decoder.result.finish_reason is None:
        decoder.run_block()
    return decoder.result
