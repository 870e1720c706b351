"""The harness itself: a dead engine is not stepped for ever."""

from types import SimpleNamespace
from typing import Any

import pytest
from harness import Ask, Engine, Served, Visit

SERVED = Served(8, "block_causal")


class Dying:
    """An engine that raises in its first step and then does nothing, with a request unfinished."""

    def __init__(self) -> None:
        executor = SimpleNamespace(execute_model=None)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor))
        self.steps = 0

    def add_request(self, *_request: Any) -> None: ...

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps == 1:
            raise RuntimeError("out of order")
        return []


def test_a_dead_engine_fails_every_later_test() -> None:
    llm = SimpleNamespace(llm_engine=Dying())
    engine = Engine(SERVED, llm, oracle=None)
    engine._fail_once_dead()
    with pytest.raises(RuntimeError, match="out of order"):
        engine.serve_over_time([Visit(Ask((7,)))])
    with pytest.raises(AssertionError, match="out of order"):
        engine.serve_over_time([Visit(Ask((7,)))])
