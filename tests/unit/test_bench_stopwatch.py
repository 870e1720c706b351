"""The stopwatch, on a clock that the test turns."""

import pytest

from vllm_edlm.bench import stopwatch
from vllm_edlm.bench.stopwatch import Place, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Program:
    """Spends 1 s before its inner method, 2 s in it and 4 s after it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def outer(self) -> str:
        self.clock.now += 1
        self.inner(2)
        self.clock.now += 4
        return "done"

    def inner(self, seconds: float) -> None:
        self.clock.now += seconds
        if seconds > 10:
            raise TimeoutError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


@pytest.fixture
def program(clock: Clock) -> Program:
    return Program(clock)


def watch() -> Stopwatch:
    return Stopwatch(lambda: None)


def test_time_belongs_to_the_innermost_part(clock: Clock, program: Program) -> None:
    stopwatch = watch()
    with stopwatch.watching([Place(program, "outer", "all"), Place(program, "inner", "core")]):
        assert program.outer() == "done"
        clock.now += 100
        program.outer()
    assert stopwatch.seconds == {"all": 10, "core": 4}


def test_methods_are_as_before_afterwards(program: Program) -> None:
    def own() -> str:
        return "own"

    program.outer = own
    with watch().watching([Place(program, "outer", "all"), Place(program, "inner", "core")]):
        assert program.outer() == "own"
        assert program.outer is not own
    assert program.outer is own
    assert "inner" not in vars(program)


def test_a_part_that_raises_has_ended(program: Program) -> None:
    stopwatch = watch()
    places = [Place(program, "outer", "all"), Place(program, "inner", "core")]
    with stopwatch.watching(places):
        with pytest.raises(TimeoutError):
            program.inner(11)
        program.outer()
    assert stopwatch.seconds == {"all": 5, "core": 13}


def test_waiting_for_the_accelerator_counts_where_its_work_was_started(clock: Clock) -> None:
    queued: list[float] = []

    def synchronize() -> None:
        while queued:
            clock.now += queued.pop()

    stopwatch = Stopwatch(synchronize)
    queued.append(5)
    with stopwatch.part("all"):
        clock.now += 1
        queued.append(2)
        with stopwatch.part("core"):
            queued.append(7)
    assert stopwatch.seconds == {"all": 3, "core": 7}
