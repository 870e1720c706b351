"""Block-diffusion language models served by vLLM."""

__version__ = "0.1.0"

ARCHITECTURE = "EfficientDLM"


def register() -> None:
    """Entry point `vllm.general_plugins`: register every served architecture in this process.

    vLLM calls it in every process it starts, possibly more than once. It imports no module
    that needs torch: the model and its configuration are resolved when they are used.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range.
    """
    from vllm_edlm.compat.version import check_vllm_version

    check_vllm_version()

    from vllm_edlm.compat.checkpoint_configs import register_checkpoint_configs
    from vllm_edlm.compat.registry import register_architecture
    from vllm_edlm.family import FAMILIES

    register_checkpoint_configs()
    for name, family in FAMILIES.items():
        register_architecture(
            name, model=f"vllm_edlm.model:{family.model_class}", config="vllm_edlm.config"
        )
