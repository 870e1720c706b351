"""A server in a child process: calls, failures, and an end that leaves nothing behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_edlm.bench.engine import Engine, EngineError, run_apart
from vllm_edlm.bench.environment import Environment, physical_cores
from vllm_edlm.bench.load import Load, Round

ENVIRONMENT = Environment(cores=physical_cores()[:1], openmp=None, cache=Path("/nowhere"))


class Echo:
    """A server that answers with what it was made of."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def measure(self, load: Load) -> Round:
        return Round(self.seconds * load.num_requests, (), ())


def broken() -> None:
    raise LookupError("no such model")


def fail(_: Echo) -> None:
    raise LookupError("no such request")


def leave(_: Echo) -> None:
    os._exit(3)


def add(echo: Echo, seconds: float) -> float:
    return echo.seconds + seconds


def environment() -> dict[str, str]:
    return dict(os.environ)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ENVIRONMENT, Echo, 2.0) as started:
        yield started


def test_a_load_is_served_in_the_child(engine: Engine) -> None:
    assert engine.measure(Load(1, 3, 1, 1)).seconds == 6.0
    assert engine.call(add, seconds=1.0) == 3.0
    assert engine.start_seconds > 0


def test_an_error_comes_back_and_the_child_goes_on(engine: Engine) -> None:
    with pytest.raises(EngineError, match="LookupError: no such request"):
        engine.call(fail)
    assert engine.call(add, 0.0) == 2.0


def test_the_childs_environment_is_its_own() -> None:
    variables = run_apart(ENVIRONMENT, environment)
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["VLLM_CACHE_ROOT"] == "/nowhere"
    assert os.environ.get("VLLM_CACHE_ROOT") != "/nowhere"


def test_a_server_that_cannot_be_built_is_an_error() -> None:
    with pytest.raises(EngineError, match="LookupError: no such model"):
        Engine(ENVIRONMENT, broken)


def test_a_child_that_dies_is_an_error() -> None:
    with Engine(ENVIRONMENT, Echo, 1.0) as engine, pytest.raises(EngineError, match="exit code 3"):
        engine.call(leave)


def test_the_process_ends_with_the_context() -> None:
    with Engine(ENVIRONMENT, Echo, 1.0) as engine:
        process = engine.call(process_id)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def process_id(_: Echo) -> int:
    return os.getpid()


def test_openmp_threads_are_bound_to_the_cores() -> None:
    with_intel = Environment(cores=(0, 2), openmp=Path("/lib/libiomp5.so")).variables()
    assert with_intel["LD_PRELOAD"] == "/lib/libiomp5.so"
    assert with_intel["KMP_AFFINITY"] == "granularity=fine,explicit,proclist=[0,2]"
    without = Environment(cores=(0, 2), openmp=None).variables()
    assert "LD_PRELOAD" not in without
    assert without["OMP_PLACES"] == "{0,2}"
    assert with_intel["OMP_NUM_THREADS"] == without["OMP_NUM_THREADS"] == "2"
