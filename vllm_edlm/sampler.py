"""One denoise step for every open block of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm import SamplingParams

from vllm_edlm import canvas as canvases
from vllm_edlm.compat.vllm_api import InputBatch, LogprobsTensors, Sampler, SamplerOutput
from vllm_edlm.kernels.row_statistics import probability, row_statistics
from vllm_edlm.logprobs import CanvasLogprobs
from vllm_edlm.reveal import RULES, Measures, rank_positions, reveal, reveal_one
from vllm_edlm.sampling import SamplingParameters
from vllm_edlm.step import LogitsRows, Step
from vllm_edlm.tiles import Columns, joined, padded_height, tiles

if TYPE_CHECKING:
    from vllm_edlm.model_state import BlockDiffusionModelState


@dataclass(frozen=True)
class Choice:
    """The token chosen for every masked position, and what speaks for it.

    Attributes:
        token: [N, B] token ids.
        measures: what the reveal rules look at.
        logprobs: of every row of logits, if a request wants them.
    """

    token: Tensor
    measures: Measures
    logprobs: LogprobsTensors | None

    @staticmethod
    def placed(rows: Columns, cell_T: Tensor, canvas_NB: Tensor) -> "Choice":
        """Put what the rows of logits yield into their cells [T] of the canvases.

        Args:
            rows: `token`, `confidence` and, where measured, `margin` and `entropy`, all [T];
                the parts of `LogprobsTensors` under their names, if wanted.
        """

        def placed(name: str) -> Tensor:
            return canvases.place(cell_T, rows[name], canvas_NB)

        def measured(name: str) -> Tensor | None:
            return placed(name) if name in rows else None

        measures = Measures(placed("confidence"), measured("margin"), measured("entropy"))
        return Choice(placed("token"), measures, _logprobs_of(rows))


def _logprobs_of(rows: Columns) -> LogprobsTensors | None:
    if "logprobs" not in rows:
        return None
    return LogprobsTensors(
        rows["logprob_token_ids"], rows["logprobs"], rows["selected_token_ranks"]
    )


class BlockDiffusionSampler:
    """Reveals tokens of the canvases and emits each block's new known run.

    Stands in for vLLM's `Sampler` in Model Runner V2. The step that the model state has
    prepared says where each canvas lies.

    Legend for shapes: N requests, B block length, T rows of logits (masked positions), R rows of
    a tile.
    """

    # The runner counts output tokens for penalties only where this is a tensor; it would count
    # tokens that the scheduler does not accept.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, state: "BlockDiffusionModelState", sampler: Sampler) -> None:
        self.state = state
        self.req_states = sampler.req_states
        self.mask_token_id = state.options.mask_token_id
        self.parameters = SamplingParameters(sampler, self.mask_token_id)
        self.logprobs: CanvasLogprobs = state.logprobs

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Take a request's sampling parameters; its block options are the model state's."""
        self.parameters.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Bring new requests' parameters to the device."""
        self.parameters.apply_staged_writes()

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Denoise once.

        Args:
            logits: [T, V], a row per masked position, requests in batch order; or the hidden
                states [T, D] that these are computed from, where the model defers them.

        Returns:
            `num_sampled` [N] tokens emitted and `num_rejected` [N] positions of the query
            whose KV is not final after the step; `sampled_token_ids` [N, B].
        """
        step = self.state.step
        if step is None:
            return self._empty_output(input_batch)
        canvas = step.canvas
        if logits.shape[0] > 0:
            canvas = self._denoise(canvas, logits, step)
        # vLLM hands them to the scheduler from there, the block state to the next step.
        self.req_states.draft_tokens[step.slots] = canvas
        self.state.blocks.keep_canvases(step, canvas)
        tokens, count, not_final = self._emit(canvas, step, input_batch)
        dims = self.parameters.sampler.get_logprobs_dims(step.layout.slots)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=self.logprobs.of_step(step, 1 + max(dims)) if dims else None,
            num_nans=None,
            num_sampled=count.to(torch.int32),
            num_rejected=not_final.to(torch.int32),
        )

    def _emit(
        self, canvas: Tensor, step: Step, input_batch: InputBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a step that left `canvas` [N, B] yields.

        Returns:
            tokens [N, B] of which the first `count` [N] of each row are emitted, and [N] the
            positions of each query whose KV is not final.
        """
        tokens, count = canvases.emitted_run(canvas, step.offset, step.width, self.mask_token_id)
        # A block completed just now was partly masked when its KV was written.
        seq_lens = input_batch.seq_lens[: input_batch.num_reqs]
        return tokens, count, seq_lens - step.block_start

    def _denoise(self, canvas: Tensor, logits: Tensor, step: Step) -> Tensor:
        """Canvas [N, B] after revealing what the rules choose."""
        masked = step.masked
        choice = self._choose(canvas, logits, step)
        forced = self._forced(masked, step)
        ranked = rank_positions(
            choice.measures, masked, step.threshold, step.rule, step.rules_in_use, forced
        )
        revealed = reveal(ranked, masked, step.steps_left)
        after = torch.where(revealed, choice.token, canvas)
        if self.parameters.bad_words.any(step.layout.slots):
            # Tokens that are innocent one by one may be a bad word together.
            too_many = self.parameters.completes_bad_word(step, canvas, after)[:, None]
            revealed = torch.where(too_many, reveal_one(ranked, masked, forced), revealed)
            after = torch.where(revealed, choice.token, canvas)
        if choice.logprobs is not None:
            self.logprobs.keep(step, revealed, choice.logprobs)
        return after

    def _forced(self, masked: Tensor, step: Step) -> Tensor | None:
        """Under token shift the first position of a block is predicted by the block before it,
        which takes part in the block's first step only: it is revealed there."""
        if not self.state.options.token_shift:
            return None
        return masked & step.is_new[:, None] & (canvases.entries(masked) == 0)

    def _choose(self, canvas: Tensor, logits: Tensor, step: Step) -> Choice:
        """Choose a token for every masked position."""
        if self.parameters.are_plain(step.layout.slots) and not self._measures(step):
            rows = self._in_tiles(logits, self._likeliest, self._statistics_dtype(logits))
        else:
            rows = self._choose_by_parameters(canvas, logits, step)
        return Choice.placed(rows, step.rows.cell, canvas)

    def _in_tiles(
        self, logits: Tensor, choose: Callable[[Tensor, slice], Columns], dtype: torch.dtype
    ) -> Columns:
        """What `choose` makes of every row's logits, which it copies as `dtype`; those of one tile
        are gone before the next tile's are computed."""
        num_rows, row_bytes = len(logits), dtype.itemsize * self.req_states.vocab_size
        parts = (
            choose(self._logits(logits[rows]), rows)
            for rows in tiles(num_rows, row_bytes, on_gpu=logits.is_cuda)
        )
        return joined(parts, num_rows)

    @staticmethod
    def _statistics_dtype(logits: Tensor) -> torch.dtype:
        """In which the statistics need a tile: a GPU's kernel reads logits as they are."""
        return logits.dtype if logits.is_cuda else torch.float32

    def _logits(self, tile: Tensor) -> Tensor:
        """Logits [R, V] of a tile's rows, which are hidden states where the model defers them."""
        return self._head(tile) if self.state.model.defers_logits else tile

    def _likeliest(self, logits_RV: Tensor, _: slice) -> Columns:
        return row_statistics(logits_RV, self.mask_token_id)._asdict()

    @staticmethod
    def _measures(step: Step) -> set[str]:
        """What the step's reveal rules read besides the confidence."""
        rules = list(RULES.values())
        return {needs for i in step.rules_in_use if (needs := rules[i].needs) is not None}

    def _choose_by_parameters(self, canvas: Tensor, logits: Tensor, step: Step) -> Columns:
        """Choose where a request's parameters change its logits, or more than the token counts."""
        slots = step.layout.slots
        self.parameters.count_known(step)
        self.parameters.count_revealed(step, 1)
        banned = self.parameters.banned(step, canvas)

        def choose(raw: Tensor, rows_R: slice) -> Columns:
            rows = step.rows.tile(rows_R)
            tile = raw.to(torch.float32, copy=True)
            self.parameters.process_(tile, rows, slots)
            if banned is not None:
                banned.apply_(tile, rows.cell)
            return self._choose_in_tile(raw, tile, rows, step)

        chosen = self._in_tiles(logits, choose, torch.float32)
        self.parameters.count_revealed(step, -1)
        return chosen

    def _head(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] of hidden states, computed at one of few heights."""
        num_rows = len(hidden_RD)
        missing = padded_height(num_rows) - num_rows
        return self.state.model.head(pad(hidden_RD, (0, 0, 0, missing)))[:num_rows]

    def _choose_in_tile(self, raw: Tensor, tile: Tensor, rows: LogitsRows, step: Step) -> Columns:
        token, drawn = self.parameters.draw(tile, rows, step.layout.slots)
        columns = {"token": token, "confidence": probability(tile, token)}
        needs = self._measures(step)
        if "margin" in needs:
            columns["margin"] = canvases.margin(tile, token, self.mask_token_id)
        if "entropy" in needs:
            columns["entropy"] = canvases.entropy(tile)
        logprobs = self.parameters.logprobs(raw, drawn, token, rows, step.layout.slots)
        if logprobs is not None:
            columns |= {
                "logprob_token_ids": logprobs.logprob_token_ids,
                "logprobs": logprobs.logprobs,
                "selected_token_ranks": logprobs.selected_token_ranks,
            }
        return columns

    def _empty_output(self, input_batch: InputBatch) -> SamplerOutput:
        """Output of a dummy batch: nothing is sampled."""
        draft_tokens = self.req_states.draft_tokens
        none = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=draft_tokens.device)
        return SamplerOutput(
            sampled_token_ids=draft_tokens[: input_batch.num_reqs],
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=none,
            num_rejected=none,
        )
