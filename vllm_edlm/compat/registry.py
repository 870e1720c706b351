"""Lazy registration of an architecture and of its configuration hooks."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def register_architecture(name: str, *, model: str, config: str) -> None:
    """Register `name` with vLLM; neither target is imported before it is needed.

    Args:
        name: the entry of `architectures` in a checkpoint's config.json.
        model: "module:Class" of the model, as `ModelRegistry.register_model` takes it.
        config: module with `configure_model(model_config)` and
            `configure_engine(vllm_config)`.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LazyConfig(VerifyAndUpdateConfig):
        """Hands vLLM's two configuration hooks on to the module named by `config`."""

        @staticmethod
        def verify_and_update_model_config(model_config: "ModelConfig") -> None:
            import_module(config).configure_model(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: "VllmConfig") -> None:
            import_module(config).configure_engine(vllm_config)

    ModelRegistry.register_model(name, model)
    MODELS_CONFIG_MAP[name] = LazyConfig
