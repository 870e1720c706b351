"""Block diffusion on Model Runner V2 in the stages of a pipeline before the last.

The last stage denoises the canvases. vLLM's runner broadcasts them, as draft tokens, together
with the tokens emitted, and writes both into the request states of the other stages before their
next step.

Legend for shapes: S slots of the runner, N requests of the batch, B block length.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_edlm.block_state import BlockState
from vllm_edlm.canvas import open_canvas
from vllm_edlm.compat.pipeline import take_outcomes_at_once
from vllm_edlm.compat.vllm_api import InputBatch, RequestState
from vllm_edlm.model_state import BlockDiffusionModelState
from vllm_edlm.virtual_rows import Ints


class StageBlockState(BlockState):
    """`BlockState` whose canvases [S, B] are those that the runner has received."""

    def _open_canvases(
        self, slots: Ints, offset: Ints, width: Ints, is_new: NDArray[np.bool_]
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """Canvases [N, B] before a step, on the device; none of their positions gets logits."""
        canvas_NB = open_canvas(
            self.canvas[self._upload(slots)],
            self._upload(offset),
            self._upload(is_new),
            self.options.mask_token_id,
        )
        return canvas_NB, np.zeros(canvas_NB.shape, dtype=bool)


class StageModelState(BlockDiffusionModelState):
    """State of a block-diffusion model in a runner that samples nothing."""

    block_state_type = StageBlockState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_outcomes_at_once()

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Write the step's token ids, canvases as the runner keeps them."""
        self.blocks.canvas = req_states.draft_tokens
        return super().prepare_inputs(input_batch, req_states)
