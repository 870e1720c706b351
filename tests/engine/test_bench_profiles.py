"""What a measured process says of its steps and its memory, on a tiny engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.environment import Environment
from vllm_edlm.bench.load import Load
from vllm_edlm.bench.memory_use import idle_bytes, peak
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.step_profile import Part, profile
from vllm_edlm.bench.tables.throughput import fixed_schedule

BLOCK = 16
STEPS = 4
TOKENS = 32
KV_BYTES = 2**26
LOAD = Load(2, 2, 16, TOKENS, fixed_schedule(BLOCK, BLOCK // STEPS))
AR_LOAD = Load(2, 2, 16, TOKENS)


@pytest.fixture(scope="module", params=[BLOCK, None], ids=["plugin", "AR"])
def block_length(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="module")
def engine(block_length: int | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    environment = Environment(cores=(0,))
    settings = Settings(environment, tmp_path_factory.mktemp("work"), Rates(1, 1, ""), quick=True)
    with settings.start(settings.shape, block_length, enforce_eager=True) as engine:
        yield engine


@pytest.fixture
def load(block_length: int | None) -> Load:
    return AR_LOAD if block_length is None else LOAD


def test_every_part_of_a_step_is_timed(
    engine: Engine, load: Load, block_length: int | None
) -> None:
    profiled = engine.call(profile, load)
    unseen = {part for part, seconds in profiled.seconds.items() if seconds == 0}
    assert unseen == ({Part.sampler} if block_length is None else set())
    assert sum(map(profiled.share, Part)) == pytest.approx(1)
    assert 0 < profiled.overhead < 1


def test_a_profiled_load_is_served_as_any(engine: Engine, load: Load) -> None:
    profiled = engine.call(profile, load).round
    plain = engine.measure(load)
    assert [trace.tokens for trace in profiled.traces] == [trace.tokens for trace in plain.traces]
    assert profiled.forwards == plain.forwards


def test_peak_memory_is_idle_and_more(engine: Engine, load: Load) -> None:
    idle = engine.call(idle_bytes)
    assert idle > KV_BYTES
    measured = engine.call(peak, load)
    # What a tiny load needs may lie in memory that start-up left to the process.
    assert measured.bytes >= idle
    assert measured.round.tokens == 2 * TOKENS


def test_a_peak_is_the_loads_own(engine: Engine, load: Load) -> None:
    before = engine.call(idle_bytes)
    assert engine.call(_hold, 2**29) == 2**29
    assert engine.call(peak, load).bytes < before + 2**28


def _hold(_server: object, size: int) -> int:
    """Touch so much memory and give it back."""
    return len(bytearray(b"x") * size)


def test_memory_is_told_in_bytes(engine: Engine) -> None:
    status = engine.call(_status)
    assert engine.call(idle_bytes) == pytest.approx(status, rel=0.05)


def _status(_server: object) -> int:
    """Resident pages of this process times their size."""
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
