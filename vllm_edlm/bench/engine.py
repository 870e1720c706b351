"""Measured engines, each in a process of its own, so that rounds of several can alternate."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from vllm_edlm.bench.environment import Environment
from vllm_edlm.bench.load import Load, Round

P = ParamSpec("P")
T = TypeVar("T")
STOP_SECONDS = 20.0


class Server(Protocol):
    """What a child process holds: something that serves a load."""

    def measure(self, load: Load) -> Round:
        """Serve the load once."""


class EngineError(RuntimeError):
    """A child process failed; the message is what it raised, or that it ended."""


class Engine:
    """A child process that holds one server. Leave it as a context: the process ends.

    Attributes:
        start_seconds: from the process' start until the server was ready.
    """

    def __init__(
        self, environment: Environment, build: Callable[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Start the process and wait until `build(*args, **kwargs)` has made its server.

        Args:
            build: a module's function or class, which the child imports by name.

        Raises:
            EngineError: the server could not be built.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, childs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(childs, build, args, kwargs), daemon=True
        )
        begin = time.perf_counter()
        with environment.applied():
            self._process.start()
        childs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin

    def measure(self, load: Load) -> Round:
        """Serve the load once."""
        return self.call(_measure, load)

    def call(
        self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`function(server, *args, **kwargs)` in the child; all of it must be picklable.

        Raises:
            EngineError: it raised there.
        """
        self._connection.send((function, args, kwargs))
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except EOFError as ended:
            raise EngineError(f"the process ended: exit code {self._exit_code()}") from ended
        if error is not None:
            raise EngineError(str(error)) from error
        return result

    def _exit_code(self) -> int | None:
        self._process.join(STOP_SECONDS)
        return self._process.exitcode

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        self._connection.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run_apart(
    environment: Environment, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """`function(*args, **kwargs)` in a process of its own, in that environment."""
    with Engine(environment, _nothing) as child:
        return child.call(_without_server, function, args, kwargs)


def _nothing() -> None:
    """The server of a process that only runs functions."""


def _without_server(
    _: None, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> T:
    return function(*args, **kwargs)


def _measure(server: Server, load: Load) -> Round:
    return server.measure(load)


def _serve(
    connection: Connection,
    build: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """The child: build the server, then answer calls until the parent is gone."""
    server = _answer(connection, build, args, kwargs, lambda _: None)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        _answer(connection, function, (server, *args), kwargs, lambda result: result)


def _answer(
    connection: Connection,
    function: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reply: Callable[[T], Any],
) -> T | None:
    """Call the function and send what `reply` makes of its result, or what it raised."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        # Not every exception can be pickled, and none takes its traceback along.
        traceback.print_exc()
        connection.send((None, EngineError(f"{type(error).__name__}: {error}")))
        return None
    connection.send((reply(result), None))
    return result
