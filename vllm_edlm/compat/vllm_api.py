"""vLLM names outside its public interface, imported in this one place."""

from vllm import _custom_ops as custom_ops
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import WeightsMapper, is_pp_missing_parameter
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics, SchedulerStats
from vllm.v1.outputs import DraftTokenIds, LogprobsLists, LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

__all__ = [
    "AttentionCGSupport",
    "AttentionGroup",
    "CUDAGraphMode",
    "DraftTokenIds",
    "EncoderCache",
    "EngineCoreOutputs",
    "GrammarOutput",
    "InputBatch",
    "KVCacheConfig",
    "LlamaForCausalLM",
    "LogitBiasState",
    "LogitsContext",
    "LogitsProcessor",
    "LogprobsLists",
    "LogprobsTensors",
    "MistralForCausalLM",
    "ModelRunnerOutput",
    "ModelState",
    "NewRequestData",
    "PenaltiesState",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Request",
    "RequestSpecDecodeMetrics",
    "RequestState",
    "RequestStatus",
    "Sampler",
    "SamplerOutput",
    "Scheduler",
    "SchedulerOutput",
    "SchedulerStats",
    "SpecDecodingStats",
    "StructuredOutputGrammar",
    "StructuredOutputManager",
    "WeightsMapper",
    "async_copy_to_np",
    "async_tensor_h2d",
    "build_attn_metadata",
    "compute_topk_scores",
    "custom_ops",
    "get_pp_group",
    "gumbel_sample",
    "is_pp_missing_parameter",
]
