"""The tables of `edlm bench` by name, imported when they are made."""

import pkgutil
from collections.abc import Callable

from vllm_edlm.bench.report import Table
from vllm_edlm.bench.settings import Settings

TABLES = {
    "throughput": "throughput:throughput",
    "throughput_large_vocabulary": "throughput:throughput_large_vocabulary",
    "tiny_math": "tiny_math:tiny_math",
    "prefill": "prefill:prefill",
    "step_time": "step_time:step_time",
    "memory": "memory:memory",
    "context": "context:context",
    "training": "training:training",
}


def maker(name: str) -> Callable[[Settings], Table]:
    """The function that makes a table.

    Raises:
        ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    function: Callable[[Settings], Table] = pkgutil.resolve_name(f"{__name__}.{TABLES[name]}")
    return function
