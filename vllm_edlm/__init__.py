"""Block-diffusion language models served by vLLM."""

__version__ = "0.1.0"

ARCHITECTURE = "EfficientDLM"


def register() -> None:
    """Entry point `vllm.general_plugins`: register the architecture in this vLLM process.

    vLLM calls it in every process it starts, possibly more than once. It imports no module
    that needs torch: the model and its configuration are resolved when they are used.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range.
    """
    from vllm_edlm.compat.version import check_vllm_version

    check_vllm_version()

    from vllm_edlm.compat.registry import register_architecture

    register_architecture(
        ARCHITECTURE,
        model="vllm_edlm.model:EfficientDLMForCausalLM",
        config="vllm_edlm.config",
    )
