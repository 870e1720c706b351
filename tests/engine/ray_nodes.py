"""Two raylets on this machine, as two machines would start them."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import ray

from examples.demo import free_port

RAY = Path(sys.executable).with_name("ray")
ADDRESS = "127.0.0.1"
# Each has room for one of vLLM's workers.
NODE = (
    *("--block", f"--node-ip-address={ADDRESS}", "--num-cpus=1", "--disable-usage-stats"),
    *("--object-store-memory=100000000", '--resources={"vllm_cpu_worker": 1}'),
)
START_SECONDS = 300


@contextmanager
def two_raylets() -> Iterator[None]:
    """Connect this process to a cluster of two nodes, which ends with the block."""
    port = free_port()
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        # The command would ask for a token, which this process may not have.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        stack.enter_context(_node("--head", f"--port={port}", "--include-dashboard=false"))
        _wait("the head's port", lambda: _answers(port))
        stack.enter_context(_node(f"--address={ADDRESS}:{port}"))
        stack.callback(ray.shutdown)
        ray.init(f"{ADDRESS}:{port}", log_to_driver=False)
        _wait("two nodes", lambda: len(ray.nodes()) == 2)
        yield


@contextmanager
def _node(*options: str) -> Iterator[None]:
    with subprocess.Popen([RAY, "start", *options, *NODE], stdout=subprocess.DEVNULL) as node:
        try:
            yield
        finally:
            node.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection((ADDRESS, port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait(what: str, is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_there():
        assert time.monotonic() < deadline, f"{what} not there within {START_SECONDS} s"
        time.sleep(1)
