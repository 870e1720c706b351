"""A model's own statistics beside vLLM's.

vLLM's plugins for statistics are loaded for every model or for none: with one installed,
`--disable-log-stats` no longer does what it says, whatever is served, and the offline engine
loads none. So vLLM's set of loggers is completed here, for a block-diffusion model alone.
Upstream shape: patches/0006.
"""

from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from vllm_edlm.family import FAMILIES
from vllm_edlm.metrics_logger import BlockDiffusionStatLogger

_MARK = "_edlm_original"


def install_stat_logger() -> None:
    """Complete the loggers of every engine that this process starts from now on, once."""
    loggers: Any = StatLoggerManager
    original = loggers.__init__
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def replacement(
        manager: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> None:
        original(manager, vllm_config, *args, **kwargs)
        _complete(manager, vllm_config)

    setattr(replacement, _MARK, original)
    loggers.__init__ = replacement


def _complete(manager: StatLoggerManager, vllm_config: VllmConfig) -> None:
    """Add the model's logger last: vLLM's has emptied the registry of an earlier engine's."""
    if not any(name in FAMILIES for name in vllm_config.model_config.architectures):
        return
    prometheus = [x for x in manager.stat_loggers if isinstance(x, PrometheusStatLogger)]
    manager.stat_loggers.append(
        BlockDiffusionStatLogger(vllm_config, manager.engine_indexes, prometheus[0])
    )
