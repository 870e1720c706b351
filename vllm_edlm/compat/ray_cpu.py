"""vLLM's Ray executor on a CPU.

vLLM places its Ray workers by the resource of an accelerator, of which a CPU has none, and
refuses the platform. A raylet started with `--resources '{"vllm_cpu_worker": 2}'` has room for
two workers here. Imported only where an engine on a CPU asks for Ray. Upstream shape:
patches/0010.
"""

from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2 as vllm_executor

RESOURCE = "vllm_cpu_worker"


class CpuRayWorker(vllm_executor.RayWorkerProc):
    """A worker in a Ray actor that has been assigned no accelerator."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The actor's node; vLLM asks before a worker loads any plugin."""
        return ray.get_runtime_context().get_node_id(), []

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Start the worker, on whatever memory nodes its process may use."""
        super().initialize_worker(*args, **kwargs | {"assigned_physical_gpu_ids": None})


class CpuRayExecutor(vllm_executor.RayExecutorV2):
    """vLLM's executor over Ray actors, placed by `RESOURCE`."""

    def _init_executor(self) -> None:
        platform: Any = type(current_platform)
        platform.ray_device_key = RESOURCE
        vllm_executor.RayWorkerProc = CpuRayWorker  # type: ignore[misc]
        super()._init_executor()
