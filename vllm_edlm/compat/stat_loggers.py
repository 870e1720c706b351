"""A model's own statistics beside vLLM's.

vLLM's plugins for statistics are loaded for every model or for none: with one installed,
`--disable-log-stats` no longer does what it says, whatever is served, and the offline engine
loads none. So vLLM's set of loggers is completed here, for a block-diffusion model alone.
Upstream shape: patches/0006.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from vllm_edlm.compat.replacement import replace_method
from vllm_edlm.family import architecture_of
from vllm_edlm.metrics_logger import BlockDiffusionStatLogger


def install_stat_logger() -> None:
    """Complete the loggers of every engine that this process starts from now on, once."""
    replace_method(StatLoggerManager, "__init__", _init)


def _init(
    original: Callable[..., None],
    manager: StatLoggerManager,
    vllm_config: VllmConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Add the model's logger last: vLLM's has emptied the registry of an earlier engine's."""
    original(manager, vllm_config, *args, **kwargs)
    if architecture_of(vllm_config.model_config) is None:
        return
    prometheus = [x for x in manager.stat_loggers if isinstance(x, PrometheusStatLogger)]
    manager.stat_loggers.append(
        BlockDiffusionStatLogger(vllm_config, manager.engine_indexes, prometheus[0])
    )
