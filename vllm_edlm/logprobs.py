"""Log-probabilities of canvases: kept from the step that reveals a token until it is emitted.

Legend for shapes: S slots, N requests, B block length, T rows of logits, W columns: the token
itself and the most likely ones.
"""

import torch
from torch import Tensor

from vllm_edlm.compat.vllm_api import LogprobsLists, LogprobsTensors
from vllm_edlm.step import Step


class CanvasLogprobs:
    """Log-probabilities of the revealed positions of every slot's open block.

    The buffers have no column until a request asks for log-probabilities, and then are as wide
    as the widest request so far.
    """

    def __init__(self, num_slots: int, block_length: int, device: torch.device) -> None:
        self.block_length = block_length
        shape = num_slots, block_length
        self.token_ids = torch.zeros(*shape, 0, dtype=torch.int32, device=device)
        self.scores = torch.zeros(*shape, 0, dtype=torch.float32, device=device)
        self.ranks = torch.zeros(*shape, dtype=torch.int64, device=device)

    def _widen(self, width: int) -> None:
        more = width - self.token_ids.shape[2]
        if more > 0:
            self.token_ids = torch.nn.functional.pad(self.token_ids, (0, more))
            self.scores = torch.nn.functional.pad(self.scores, (0, more))

    def keep(self, step: Step, revealed_NB: Tensor, rows: LogprobsTensors) -> None:
        """Keep what a step says about the positions that it reveals.

        Args:
            rows: of every row of logits, [T, W] and [T].
        """
        width = rows.logprobs.shape[1]
        self._widen(width)
        for buffer, values in (
            (self.token_ids[:, :, :width], rows.logprob_token_ids),
            (self.scores[:, :, :width], rows.logprobs),
            (self.ranks[:, :, None], rows.selected_token_ranks[:, None]),
        ):
            placed = buffer[step.slots].flatten(0, 1)
            placed[step.rows.cell] = values.to(placed.dtype)
            placed = placed.unflatten(0, revealed_NB.shape)
            buffer[step.slots] = torch.where(revealed_NB[:, :, None], placed, buffer[step.slots])

    def of_step(self, step: Step, width: int) -> LogprobsTensors:
        """Canvas by canvas, [N * B, W]; a request's emitted run begins where vLLM is told."""
        self._widen(width)
        offset = step.layout.known - step.layout.block_start
        run_start = [i * self.block_length + int(o) for i, o in enumerate(offset)]
        return LogprobsTensors(
            self.token_ids[step.slots, :, :width].flatten(0, 1),
            self.scores[step.slots, :, :width].flatten(0, 1),
            self.ranks[step.slots].flatten(0, 1),
            [*run_start, len(run_start) * self.block_length],
        )

    def restore(self, slot: int, kept: LogprobsLists) -> None:
        """Take up what the open block of a request had when it was preempted, [B, W]."""
        width = kept.logprobs.shape[1]
        self._widen(width)
        self.token_ids[slot, :, :width] = torch.from_numpy(kept.logprob_token_ids)
        self.scores[slot, :, :width] = torch.from_numpy(kept.logprobs)
        self.ranks[slot] = torch.from_numpy(kept.sampled_token_ranks)
