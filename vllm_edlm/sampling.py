"""What a request's sampling parameters do to its rows of logits.

vLLM's own states hold the parameters and its own kernels apply them; here they see a canvas
instead of one next token. Rows come in tiles, so that no fp32 copy of all logits is made.

Legend for shapes: N requests, B block length, R rows of a tile, V vocabulary, S slots.
"""

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from vllm_edlm.bad_words import BadWords, BannedTokens
from vllm_edlm.canvas import entries, open_entries
from vllm_edlm.compat.vllm_api import (
    LogitBiasState,
    LogitsContext,
    LogitsProcessor,
    LogprobsTensors,
    PenaltiesState,
    RequestState,
    Sampler,
    async_tensor_h2d,
    compute_topk_scores,
    gumbel_sample,
)
from vllm_edlm.kernels.row_statistics import row_statistics
from vllm_edlm.step import LogitsRows, Step
from vllm_edlm.virtual_rows import Ints


class SamplingParameters:
    """Sampling parameters of every request in the runner.

    vLLM's state for bad words is not used: it looks back from the next token, while a canvas
    is filled in any order.
    """

    def __init__(self, sampler: Sampler, mask_token_id: int) -> None:
        self.sampler = sampler
        self.req_states: RequestState = sampler.req_states
        self.mask_token_id = mask_token_id
        self.penalties: PenaltiesState = sampler.penalties_state
        bias = sampler.logits_processors[0]
        assert isinstance(bias, LogitBiasState)
        self.bias = bias
        # Those that vLLM asks when a request comes: bad words are left out.
        self.processors: list[LogitsProcessor] = [self.bias, self.penalties]
        sampler.logits_processors = self.processors
        self.bad_words = BadWords(self.req_states.max_num_reqs, self.req_states.device)
        self.counted = np.zeros(self.req_states.max_num_reqs, dtype=np.int64)

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Take the parameters of the request that now has `slot`."""
        self.sampler.add_request(slot, params)
        self.bad_words.add(slot, params.bad_words_token_ids)
        self.counted[slot] = self.req_states.prefill_len.np[slot]

    def apply_staged_writes(self) -> None:
        """Bring new requests' parameters to the device; called once before a step."""
        self.sampler.apply_staged_writes()

    def are_plain(self, slots: Ints) -> bool:
        """Whether all of a batch's requests, on the CPU [N], take the likeliest tokens, and the
        model's logits as they are; no more is asked about them."""
        sampler = self.sampler
        changes = (
            sampler.sampling_states.temperature.np[slots] > 0,
            self.bias.use_logit_bias[slots],
            self.penalties.use_penalty[slots],
        )
        return not (
            any(change.any() for change in changes)
            or self.bad_words.any(slots)
            or sampler.get_logprobs_dims(slots) is not None
        )

    def count_known(self, step: Step) -> None:
        """Count the tokens that became known since the last step, for the penalties."""
        slots, known = step.layout.slots, step.layout.known
        if self.penalties.use_penalty[slots].any():
            counted = async_tensor_h2d(self.counted[slots], device=step.known.device)
            index_B = entries(self.req_states.draft_tokens)
            position_NB = counted[:, None] + index_B
            is_new_NB = position_NB < step.known[:, None]
            inside_NB = position_NB.clamp(max=self.req_states.all_token_ids.gpu.shape[1] - 1)
            token_NB = self.req_states.all_token_ids.gpu[step.slots[:, None], inside_NB]
            self._count(step, token_NB, is_new_NB, 1)
        self.counted[slots] = np.maximum(self.counted[slots], known)

    def count_revealed(self, step: Step, times: int) -> None:
        """Add `times` to the counts of the revealed tokens that are not known yet."""
        if self.penalties.use_penalty[step.layout.slots].any():
            is_open_NB = open_entries(step.canvas, step.offset, step.width)
            self._count(step, step.canvas, is_open_NB & ~step.masked, times)

    def _count(self, step: Step, token_NB: Tensor, counts_NB: Tensor, times: int) -> None:
        """Add `times` to the counts of the tokens for which `counts_NB` holds."""
        counts = self.penalties.output_bin_counts
        cell_NB = step.slots[:, None] * counts.shape[1] + token_NB.masked_fill(~counts_NB, 0)
        counts.view(-1).scatter_add_(
            0, cell_NB.flatten().long(), (counts_NB * times).flatten().to(counts.dtype)
        )

    def banned(self, step: Step, canvas_NB: Tensor) -> BannedTokens | None:
        """Tokens that would complete a bad word, if any request of the step has bad words."""
        if not self.bad_words.any(step.layout.slots):
            return None
        words = self.bad_words.index(step.layout.slots)
        return words.banned(self._window(step, canvas_NB))

    def completes_bad_word(self, step: Step, before_NB: Tensor, after_NB: Tensor) -> Tensor:
        """[N] bool: revealing turned canvas `before_NB` into one with a bad word."""
        words = self.bad_words.index(step.layout.slots)
        return words.completes(self._window(step, before_NB), self._window(step, after_NB))

    def _window(self, step: Step, canvas_NB: Tensor) -> Tensor:
        """The text in which bad words are looked for: the output, as vLLM does."""
        return self.bad_words.index(step.layout.slots).window(
            self.req_states.all_token_ids.gpu,
            step.slots,
            step.block_start,
            step.offset,
            step.width,
            canvas_NB,
            self.mask_token_id,
            first_N=self.req_states.prompt_len.gpu[step.slots],
        )

    def process_(self, logits_RV: Tensor, rows: LogitsRows, slots: Ints) -> None:
        """Apply bias, bans and penalties to fp32 rows in place.

        Args:
            slots: [N] the batch's slots, on the CPU.
        """
        zero_R = torch.zeros_like(rows.slot)
        context = LogitsContext(
            expanded_idx_mapping=rows.slot,
            idx_mapping=rows.slot,
            idx_mapping_np=slots,
            # A row's own request has no rows before it that would be tokens of its past.
            expanded_local_pos=zero_R,
            input_ids=zero_R,
            # vLLM counts from the position that is read, one before the one predicted.
            pos=rows.position - 1,
            seq_lens_upper_bound_np=slots,
        )
        for processor in self.processors:
            processor.apply(logits_RV, context)

    def draw(self, logits_RV: Tensor, rows: LogitsRows, slots: Ints) -> tuple[Tensor, Tensor]:
        """Choose a token for every row of processed logits.

        Returns:
            token [R], and the logits [R, V] it was drawn from: after temperature, min-p, top-k
            and top-p, without the mask token. Where all requests are greedy these are
            `logits_RV` themselves.
        """
        states = self.sampler.sampling_states
        if not states.temperature.np[slots].any():
            return row_statistics(logits_RV, self.mask_token_id).token, logits_RV
        candidates = logits_RV.clone()
        candidates[:, self.mask_token_id] = -torch.inf
        states.apply_temperature(candidates, rows.slot, slots)
        states.apply_min_p(candidates, rows.slot, slots)
        candidates = states.apply_top_k_top_p(candidates, rows.slot, slots)
        token_R = gumbel_sample(
            candidates,
            rows.slot,
            states.temperature.gpu,
            states.seeds.gpu,
            rows.counter,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        return token_R, candidates

    def logprobs(
        self, raw_RV: Tensor, drawn_RV: Tensor, token_R: Tensor, rows: LogitsRows, slots: Ints
    ) -> LogprobsTensors | None:
        """Log-probabilities (or logits) that the batch's requests ask for, of every row.

        Args:
            raw_RV: the model's logits, for vLLM's raw modes.
            drawn_RV: what the tokens were drawn from, for its processed modes.
        """
        dims = self.sampler.get_logprobs_dims(slots)
        if dims is None:
            return None
        source, scores = self.sampler.logprobs_mode.split("_")
        if source == "processed":
            drawn_RV[:, self.mask_token_id] = -torch.inf
        return compute_topk_scores(
            drawn_RV if source == "processed" else raw_RV,
            dims[0],
            token_R,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=rows.slot,
            max_per_req_token_ids=dims[1],
            logits_mode=scores == "logits",
        )
