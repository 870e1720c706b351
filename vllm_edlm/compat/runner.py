"""Model Runner V2 on a CPU without Triton, and one step at a time in a pipeline.

vLLM's diffusion models need Model Runner V2, and vLLM takes that runner to need Triton. With
the kernels of `compat.cpu_kernels` it does not. And vLLM plans as many steps ahead as a pipeline
has stages, where a block's next step follows from the outcome of its last one. Only the
configuration of an engine that serves a block-diffusion model is changed, by giving that one
object a subclass of its class, so that every other engine keeps its runner. Upstream shape:
patches/0001, patches/0008 for async scheduling, patches/0009 for pipelines.
"""

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_edlm.options import served_options


class BlockDiffusionVllmConfig(VllmConfig):
    """`VllmConfig` whose engine plans a step when the outcome of the last one is in.

    Pickled by reference to this class, so it means the same in every process.
    """

    @property
    def max_concurrent_batches(self) -> int:
        """Steps under way at once, whatever the number of pipeline stages."""
        return 2 if self.scheduler_config.async_scheduling else 1


class VllmConfigWithoutTriton(BlockDiffusionVllmConfig):
    """The same for an engine that runs Model Runner V2 although Triton is missing."""

    @property
    def use_v2_model_runner(self) -> bool:
        if envs.VLLM_USE_V2_MODEL_RUNNER is False:
            raise ValueError(
                "block-diffusion models need Model Runner V2; unset VLLM_USE_V2_MODEL_RUNNER=0"
            )
        return True

    def _validate_v2_model_runner(self) -> None:
        # The CPU platform has just switched async scheduling off, as "not required" there.
        options = served_options(self.model_config.hf_config)
        self.scheduler_config.async_scheduling = options.async_scheduling
        if unsupported := self._get_v2_model_runner_unsupported_features():
            raise ValueError(f"Model Runner V2 does not yet support: {', '.join(unsupported)}")


def use_model_runner_v2(vllm_config: VllmConfig) -> None:
    """Let `vllm_config` choose Model Runner V2; with a GPU or a CPU Triton it does by itself."""
    needs_no_triton = current_platform.is_cpu() and not HAS_TRITON
    vllm_config.__class__ = VllmConfigWithoutTriton if needs_no_triton else BlockDiffusionVllmConfig
