"""The server under load: its start, its processes' memory, its metrics."""

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from examples.demo import free_port, wait_until_healthy

# It serves tiny-math where no model is named.
SERVE = Path(__file__).parents[2] / "examples" / "serve.sh"
NAME = "tiny-math"
LOG = Path("runs") / "soak-server.log"
MAX_SEQS = 16
# Requests running or waiting; vLLM refuses those that come beyond, with 503.
MAX_QUEUED = 3 * MAX_SEQS
MIB = 2**20
# Fewer and smaller KV pages than that many requests may come to need: some are preempted.
FLAGS = (
    *("--dtype", "float32", "--max-num-seqs", str(MAX_SEQS)),
    *("--max-num-queued-reqs", str(MAX_QUEUED), "--kv-cache-memory-bytes", str(8 * MIB)),
    *("--block-size", "32"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
# The engine has one core, the API server and the client of two-core machines the other.
VARIABLES = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
API_SERVER = "API server"
# vLLM calls its processes so.
TITLE = "VLLM::"

KV_USAGE = "vllm:kv_cache_usage_perc"
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PREEMPTIONS = "vllm:num_preemptions_total"


@dataclass(frozen=True)
class Sample:
    """Resident memory at one moment.

    Attributes:
        seconds: since the load began.
        bytes: by name of the process.
    """

    seconds: float
    bytes: dict[str, int]


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    address: str
    process: psutil.Process

    def memory(self) -> dict[str, int]:
        """Resident bytes of the server's process and of those that it started, by their names."""
        memory = {API_SERVER: self.process.memory_info().rss}
        for child in self.process.children(recursive=True):
            title = " ".join(child.cmdline()).strip()
            if title.startswith(TITLE):
                memory[title.removeprefix(TITLE)] = child.memory_info().rss
        return memory


async def metrics(address: str) -> dict[str, float]:
    """Every metric of a server's /metrics, summed over its labels."""
    async with httpx.AsyncClient(timeout=60) as client:
        text = (await client.get(f"{address}/metrics")).text
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


@dataclass
class Watch:
    """Samples the memory of a server as long as it is entered."""

    server: Server
    every: float
    samples: list[Sample] = field(default_factory=list)

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _sample(self) -> None:
        begin = time.monotonic()
        while True:
            self.samples.append(Sample(time.monotonic() - begin, self.server.memory()))
            await asyncio.sleep(self.every)


@contextmanager
def served() -> Iterator[Server]:
    """Serve tiny-math in fp32; yields the server once it answers."""
    port = free_port()
    command = [str(SERVE), *FLAGS, "--host", "127.0.0.1", "--port", str(port)]
    LOG.parent.mkdir(exist_ok=True)
    with (
        LOG.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | VARIABLES) as process,
    ):
        try:
            wait_until_healthy(process, address := f"http://127.0.0.1:{port}", LOG)
            yield Server(address, psutil.Process(process.pid))
        finally:
            process.terminate()
