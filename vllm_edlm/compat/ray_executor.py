"""Which of vLLM's Ray executors an engine has, asked while it is configured."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.executor import Executor


def use_cpu_workers(vllm_config: VllmConfig) -> None:
    """On a CPU, let an engine that asks for Ray have an executor that finds its workers there."""
    parallel = vllm_config.parallel_config
    if current_platform.is_cpu() and parallel.distributed_executor_backend == "ray":
        # Not for every engine: it imports Ray.
        from vllm_edlm.compat.ray_cpu import CpuRayExecutor

        parallel.distributed_executor_backend = CpuRayExecutor


def is_legacy(vllm_config: VllmConfig) -> bool:
    """Whether it is the executor that has only the last stage of a pipeline sample, so that the
    others do not receive what was sampled (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0)."""
    if not vllm_config.parallel_config.use_ray:
        return False
    return Executor.get_class(vllm_config).__name__ == "RayDistributedExecutor"
