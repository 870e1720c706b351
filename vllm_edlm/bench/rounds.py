"""Rounds that alternate between engines, so that what is compared was measured close in time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from rich.progress import track

from vllm_edlm.bench.engine import Engine, Server
from vllm_edlm.bench.load import Load, Round
from vllm_edlm.bench.report import Value

AR = "AR"
PLUGIN = "plugin"
ADAPTIVE = "plugin, adaptive canvas"
REFERENCE = "reference loop"
# Enough for every kind of forward of a cell to run once.
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Cell:
    """One figure to measure.

    Attributes:
        engine: name of the engine that serves it.
        columns: what tells it from other cells; all cells of a table name the same columns.
        load: what is served.
    """

    engine: str
    columns: Mapping[str, Value]
    load: Load

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cells whose rounds belong to one figure."""
        return self.engine, *self.columns.values()


@dataclass(frozen=True)
class Sample:
    """A cell measured once, beside what it is compared with.

    Attributes:
        ar: the AR engine's round in the same group.
        reference: the reference loop's in the same group, if it has that cell.
    """

    cell: Cell
    round: Round
    ar: Round
    reference: Round | None = None


@contextmanager
def running(starts: Mapping[str, Callable[[], Engine]]) -> Iterator[dict[str, Engine]]:
    """Start engines by name, one after another; all of them end with the context."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(start()) for name, start in starts.items()}


def start_up(engines: Mapping[str, Engine]) -> str:
    """A sentence about the time that the engines took to start."""
    seconds = ", ".join(f"{name} {engine.start_seconds:.0f} s" for name, engine in engines.items())
    return (
        f"Start-up of the processes, one after another: {seconds}. They share a compile cache, "
        "which is empty at the start of a run without `--warm-start`."
    )


def alternate(
    engines: Mapping[str, Server], groups: Sequence[Sequence[Cell]], rounds: int
) -> list[Sample]:
    """Measure all groups of cells once a round, after a warm-up.

    Args:
        groups: cells that are compared with the AR cell of their group, of which each has one.
    """
    _warm_up(engines, groups)
    plan = [group for _ in range(rounds) for group in groups]
    return [
        sample
        for group in track(plan, "Measuring")
        for sample in compared([(cell, engines[cell.engine].measure(cell.load)) for cell in group])
    ]


def compared(measured: Sequence[tuple[Cell, Round]]) -> list[Sample]:
    """The cells of a group and their rounds, each beside those it is compared with.

    The reference loop's is that of the cell with the same columns.
    """
    (ar,) = (round_ for cell, round_ in measured if cell.engine == AR)
    references = {
        tuple(cell.columns.items()): round_ for cell, round_ in measured if cell.engine == REFERENCE
    }
    return [
        Sample(cell, round_, ar, references.get(tuple(cell.columns.items())))
        for cell, round_ in measured
    ]


def _warm_up(engines: Mapping[str, Server], groups: Sequence[Sequence[Cell]]) -> None:
    """Serve each cell's first tokens: the first run of a shape of batch may take longer."""
    cells = {cell.key: cell for group in groups for cell in group}
    for cell in track(list(cells.values()), "Warming up"):
        load = cell.load
        short = replace(
            load,
            num_requests=min(load.num_requests, load.concurrency),
            output_length=min(load.output_length, WARM_UP_TOKENS),
        )
        engines[cell.engine].measure(short)
