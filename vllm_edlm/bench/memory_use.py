"""Memory of an engine in this process, over what it holds when idle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_edlm.bench.load import Load, Round

if TYPE_CHECKING:
    from vllm_edlm.bench.vllm_server import VllmServer

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# proc(5): resets the peak of resident memory.
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Peak:
    """A load served once.

    Attributes:
        bytes: most memory held at any time.
        round: what was served.
    """

    bytes: int
    round: Round


def idle_bytes(server: VllmServer) -> int:
    """Memory of an engine that has served nothing yet; all of its KV cache is in it.

    On a GPU what torch has allocated there, else resident memory of the process.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    _touch_kv(server)
    return resident("VmRSS")


def peak(server: VllmServer, load: Load) -> Peak:
    """Serve the load once and say how much memory was held at most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        round_ = server.measure(load)
        return Peak(torch.cuda.max_memory_allocated(), round_)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    round_ = server.measure(load)
    return Peak(resident("VmHWM"), round_)


def _touch_kv(server: VllmServer) -> None:
    """Make the KV cache resident: its pages take no memory before they are first written."""
    runner = server.engine.model_executor.driver_worker.worker.model_runner
    for cache in runner.kv_caches:
        cache.zero_()


def resident(field: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, `VmHWM` at its peak (proc(5))."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, field
    return int(match[1]) * 2**10
