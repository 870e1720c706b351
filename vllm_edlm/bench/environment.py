"""The environment of measured processes: cores, OpenMP library, caches. The same for all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def physical_cores() -> tuple[int, ...]:
    """One logical CPU of every physical core that this process may use."""
    first_of_core: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(_SIBLINGS.format(cpu))
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        first_of_core.setdefault(core, cpu)
    return tuple(first_of_core.values())


def intel_openmp() -> Path | None:
    """Intel's OpenMP library of this Python environment, which vLLM's CPU build asks for."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.exists() else None


@dataclass(frozen=True)
class Environment:
    """Where a measured process runs.

    Attributes:
        cores: logical CPUs, one OpenMP thread on each.
        openmp: OpenMP library to preload; None: torch's own.
        cache: vLLM's cache folder; None: the user's. An empty one makes start-up compile anew.
    """

    cores: tuple[int, ...] = field(default_factory=physical_cores)
    openmp: Path | None = field(default_factory=intel_openmp)
    cache: Path | None = None

    def variables(self) -> dict[str, str]:
        """Environment variables of the process."""
        variables = {
            # The engine runs in the measured process itself, on all of its cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(len(self.cores)),
        }
        if self.cache is not None:
            variables["VLLM_CACHE_ROOT"] = str(self.cache)
        return variables | self._openmp_variables()

    def _openmp_variables(self) -> dict[str, str]:
        """As vLLM sets them for its worker processes (vllm/utils/ompmultiprocessing.py)."""
        cores = ",".join(map(str, self.cores))
        if self.openmp is None:
            return {"OMP_PLACES": f"{{{cores}}}", "OMP_PROC_BIND": "true"}
        return {
            "LD_PRELOAD": str(self.openmp),
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For a while, processes started from this one get these variables."""
        before = dict(os.environ)
        os.environ.update(self.variables())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __str__(self) -> str:
        library = self.openmp.name if self.openmp is not None else "torch's OpenMP"
        return f"{len(self.cores)} threads on cores {', '.join(map(str, self.cores))}, {library}"
