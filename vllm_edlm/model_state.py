"""Block diffusion on vLLM's Model Runner V2: what runs, what it attends to, what it yields."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from vllm_edlm.attention_rows import RowBuffers
from vllm_edlm.block_state import BlockState, OpenBlock
from vllm_edlm.compat.lora import install_lora_mask, map_logits_rows
from vllm_edlm.compat.vllm_api import (
    AttentionCGSupport,
    AttentionGroup,
    CUDAGraphMode,
    EncoderCache,
    InputBatch,
    KVCacheConfig,
    ModelState,
    NewRequestData,
    RequestState,
    Sampler,
    async_tensor_h2d,
    build_attn_metadata,
)
from vllm_edlm.logprobs import CanvasLogprobs
from vllm_edlm.options import request_options, served_options
from vllm_edlm.sampler import BlockDiffusionSampler
from vllm_edlm.step import Step
from vllm_edlm.virtual_rows import VirtualRows, virtual_rows


class BlockDiffusionModelState(ModelState):
    """State of a block-diffusion model in the runner (vLLM: `ModelState`).

    A query of a request holds, in order: known positions whose KV is not final yet, among
    them a block that the last step completed, and the open block. So the commit of one block
    and the first denoise step of the next are one forward.
    """

    # Every token a step yields comes from the canvas, that is from vLLM's draft tokens.
    num_new_sampled_tokens_per_step = 0
    block_state_type: type[BlockState] = BlockState

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        # A decoder of vLLM's with `BlockDiffusionMixin`, for which there is no common type.
        self.model: Any = model
        self.options = served_options(vllm_config.model_config.hf_config)
        self.blocks = self.block_state_type(
            self.max_num_reqs, self.options, lambda: self.max_model_len, device
        )
        # A complete block and an open one, of every request.
        rows_per_request = self.options.block_length + 1 if self.options.has_causal_past else 2
        self.row_buffers = RowBuffers(self.max_num_reqs * rows_per_request, device)
        self.logprobs = CanvasLogprobs(self.max_num_reqs, self.options.block_length, device)
        self.step: Step | None = None
        self.is_constrained = np.zeros(self.max_num_reqs, dtype=bool)
        install_lora_mask(model)

    def get_supported_generation_tasks(self) -> tuple[Any, ...]:
        """Text generation only."""
        return ("generate",)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """No full CUDA graphs: the number of attention rows follows from the blocks."""
        return AttentionCGSupport.NEVER, "block-diffusion rows"

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take in a new or resumed request."""
        params = new_req_data.sampling_params
        assert params is not None, "pooling is refused at start-up"
        open_block = self._open_block(new_req_data)
        self.is_constrained[req_index] = params.structured_outputs is not None
        self.blocks.add(
            req_index,
            new_req_data.prompt_len,
            request_options(params.extra_args, self.options, params.structured_outputs is not None),
            open_block,
        )
        if open_block is not None and open_block.logprobs is not None:
            self.logprobs.restore(req_index, open_block.logprobs)

    def _open_block(self, new_req_data: NewRequestData) -> OpenBlock | None:
        """The open block of a resumed request."""
        return getattr(new_req_data, "open_block", None)

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> Tensor | None:
        """The model embeds token ids itself."""
        return None

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Nothing beyond the runner's own inputs."""
        return {}

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Write the step's token ids: known tokens, then the open block's canvas."""
        self.step = None
        self.model.defers_logits = False
        if not self._is_dummy(input_batch, req_states):
            self.step = self.blocks.begin_step(input_batch)
            self._write_input_ids(self.step, input_batch, req_states)
            self._write_logits_rows(self.step, input_batch)
            self.model.defers_logits = self._may_defer_logits(self.step)
            self._follow_scheduler(self.step, input_batch, req_states)
        return {}

    def _may_defer_logits(self, step: Step) -> bool:
        """Whether logits are seen by the sampler alone, which then holds a tile of them only;
        vLLM writes grammars into the whole, and maps whole steps to LoRA adapters."""
        is_constrained = self.is_constrained[step.layout.slots].any()
        return not is_constrained and self.vllm_config.lora_config is None

    @staticmethod
    def _is_dummy(input_batch: InputBatch, req_states: RequestState) -> bool:
        return input_batch.req_ids[0] not in req_states.req_id_to_index

    def _write_logits_rows(self, step: Step, input_batch: InputBatch) -> None:
        """Have logits computed for the masked positions alone."""
        border = np.concatenate(([0], np.cumsum(step.num_rows_np))).astype(np.int32)
        row = np.arange(border[-1], dtype=np.int32) - np.repeat(border[:-1], step.num_rows_np)
        input_batch.logits_indices = step.rows.source
        input_batch.cu_num_logits_np = border
        input_batch.cu_num_logits = async_tensor_h2d(border, device=self.device)
        input_batch.expanded_local_pos = async_tensor_h2d(row, device=self.device)
        input_batch.expanded_idx_mapping = step.rows.slot
        map_logits_rows(self.model, step.rows.source)

    def _follow_scheduler(
        self, step: Step, input_batch: InputBatch, req_states: RequestState
    ) -> None:
        """The runner appends new tokens at its own count; the scheduler's count rules."""
        denoises = step.width > step.offset
        total = req_states.total_len.gpu
        total[step.slots] = torch.where(denoises, step.known.to(total.dtype), total[step.slots])
        # The scheduler keeps each canvas, so that preemption loses no revealed token.
        input_batch.has_structured_output_reqs = True
        # vLLM spares a pipeline the outcome of a prompt's last step where one token is left to
        # generate: it takes that step to sample it.
        input_batch.max_seq_len_np = None

    def _write_input_ids(
        self, step: Step, input_batch: InputBatch, req_states: RequestState
    ) -> None:
        num_tokens = input_batch.num_tokens
        request = np.repeat(np.arange(input_batch.num_reqs), input_batch.num_scheduled_tokens)
        request_T = async_tensor_h2d(request, device=self.device)
        position_T = input_batch.positions[:num_tokens]
        slot_T = step.slots[request_T]
        entry_T = (position_T - step.block_start[request_T]).clamp_(
            0, self.options.block_length - 1
        )
        input_batch.input_ids[:num_tokens] = torch.where(
            position_T < step.known[request_T],
            req_states.all_token_ids.gpu[slot_T, position_T],
            step.canvas[request_T, entry_T].to(torch.int32),
        )

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention metadata with one non-causal sequence per virtual row."""
        layout = self.blocks.layout(input_batch)
        rows = virtual_rows(
            layout.first,
            layout.length,
            self.blocks.origin[layout.slots],
            self.blocks.full_length[layout.slots],
            layout.open_start,
            causal_past=self.options.has_causal_past,
        )
        return self._row_metadata(
            rows, input_batch, block_tables, slot_mappings, attn_groups, kv_cache_config
        )

    def _row_metadata(
        self,
        rows: VirtualRows,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, Any]:
        on_device = self.row_buffers.write(rows, block_tables)
        query_start = rows.query_start.astype(np.int32)
        kv_length = rows.kv_length.astype(np.int32)
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=len(rows.request),
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=on_device.query_start,
            query_start_loc_cpu=torch.from_numpy(query_start),
            max_query_len=int(np.diff(query_start).max()),
            seq_lens=on_device.kv_length,
            seq_lens_cpu_upper_bound=torch.from_numpy(kv_length),
            max_seq_len=int(kv_length.max()),
            block_tables=on_device.block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            positions=input_batch.positions,
            causal=False,
        )

    def custom_sampler(self, sampler: Sampler) -> tuple[Any, Any] | None:
        """The sampler that denoises the canvases (vLLM: in place of `Sampler`)."""
        return BlockDiffusionSampler(self, sampler), None
