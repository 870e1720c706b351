"""Where a program's time goes, by the methods that it runs in."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A method of one object, and the part of the program that it belongs to."""

    owner: Any
    method: str
    part: str


class Stopwatch:
    """Seconds spent in each part, without those spent in parts that run inside it.

    Attributes:
        seconds: by part.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """Take what waits for an accelerator, so that its time counts where it is spent."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time until the end of the context is the part's."""
        self._settle()
        self._running.append(name)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def _settle(self) -> None:
        """Give the time since the last call to the innermost part."""
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self, places: Iterable[Place]) -> Iterator[None]:
        """Time these methods until the end of the context."""
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(self._timed(place))
            yield

    @contextmanager
    def _timed(self, place: Place) -> Iterator[None]:
        original = getattr(place.owner, place.method)
        was_own = place.method in vars(place.owner)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(place.part):
                return original(*args, **kwargs)

        setattr(place.owner, place.method, timed)
        try:
            yield
        finally:
            if was_own:
                setattr(place.owner, place.method, original)
            else:
                delattr(place.owner, place.method)
