"""Tokens per second by concurrency, block length and tokens per forward, on random weights.

Random weights are never sure of a token, so threshold 1.0 leaves all to `diffusion_max_steps`,
which reveals the same number of positions in every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.figures import NOTES, by_cell, row
from vllm_edlm.bench.load import Load
from vllm_edlm.bench.report import Plot, Table, Value
from vllm_edlm.bench.rounds import (
    ADAPTIVE,
    AR,
    PLUGIN,
    REFERENCE,
    Cell,
    alternate,
    running,
    start_up,
)
from vllm_edlm.bench.settings import BLOCK_LENGTH, Settings
from vllm_edlm.bench.shapes import Shape

Pairs = Sequence[tuple[int, int]]
"""Block lengths and tokens per forward."""

LENGTH = 64
QUICK_LENGTH = 32
CONCURRENCIES = (1, 4, 8, 16)
QUICK_CONCURRENCIES = (1, 2)
LARGE_VOCABULARY = 151_936
QUICK_LARGE_VOCABULARY = 1024
ALL_PAIRS = [(block, tokens) for block in (8, 16, 32) for tokens in (1, 2, 4, 8)]
LARGE_VOCABULARY_PAIRS = [(block, tokens) for block in (16, 32) for tokens in (4, 8)]
# The cells that the other engines take part in.
MAIN_PAIRS = [(16, 4), (32, 8)]
REFERENCE_CONCURRENCIES = (1, 8)
PLOT = Plot(
    x="concurrency",
    y="ratio to AR",
    series=("engine", "tokens per forward"),
    panels=("block length",),
    log_x=True,
)


def fixed_schedule(block_length: int, tokens_per_forward: int) -> dict[str, Any]:
    """Request options that reveal so many positions in every step, whatever the confidence."""
    return {
        "diffusion_canvas_length": block_length,
        "diffusion_threshold": 1.0,
        "diffusion_max_steps": block_length // tokens_per_forward,
    }


def throughput(settings: Settings) -> Table:
    """AR, plugin, its adaptive canvas and the reference loop."""
    shape = settings.shape
    pairs = MAIN_PAIRS if settings.quick else ALL_PAIRS
    starts = ar_and_plugin(settings, shape) | {
        ADAPTIVE: lambda: settings.start(
            shape, BLOCK_LENGTH, additional_config={"edlm": {"adaptive_canvas": True}}
        ),
        REFERENCE: lambda: settings.reference(shape),
    }
    return _table("throughput", settings, shape, starts, pairs)


def throughput_large_vocabulary(settings: Settings) -> Table:
    """AR and plugin, with the vocabulary of the released checkpoints."""
    vocabulary = QUICK_LARGE_VOCABULARY if settings.quick else LARGE_VOCABULARY
    shape = replace(settings.shape, vocabulary=vocabulary)
    pairs = MAIN_PAIRS if settings.quick else LARGE_VOCABULARY_PAIRS
    starts = ar_and_plugin(settings, shape)
    return _table("throughput_large_vocabulary", settings, shape, starts, pairs)


def ar_and_plugin(settings: Settings, shape: Shape) -> dict[str, Callable[[], Engine]]:
    """How the two engines that most tables compare start, by name."""
    return {
        AR: lambda: settings.start(shape, None),
        PLUGIN: lambda: settings.start(shape, BLOCK_LENGTH),
    }


def _table(
    name: str,
    settings: Settings,
    shape: Shape,
    starts: dict[str, Callable[[], Engine]],
    pairs: Pairs,
) -> Table:
    length = QUICK_LENGTH if settings.quick else LENGTH
    concurrencies = QUICK_CONCURRENCIES if settings.quick else CONCURRENCIES
    with running(starts) as engines:
        groups = plan(list(starts), concurrencies, pairs, length)
        samples = alternate(engines, groups, settings.rounds)
        notes = [*NOTES, start_up(engines)]
    return Table(
        name=name,
        title=f"Throughput: {shape}, prompt {length}, output {length}",
        rows=[row(group, shape, settings.rates) for group in by_cell(samples)],
        notes=notes,
        plot=PLOT,
    )


def plan(
    engines: Sequence[str], concurrencies: Sequence[int], pairs: Pairs, length: int
) -> list[list[Cell]]:
    """Groups of cells: AR anew before the cells of each block length, at each concurrency."""
    return [
        [
            _ar_cell(concurrency, length),
            *(
                _cell(engine, concurrency, pair, length)
                for pair in pairs
                if pair[0] == block_length
                for engine in engines
                if _takes_part(engine, concurrency, pair)
            ),
        ]
        for concurrency in concurrencies
        for block_length in dict.fromkeys(block for block, _ in pairs)
    ]


def _takes_part(engine: str, concurrency: int, pair: tuple[int, int]) -> bool:
    if engine == REFERENCE:
        return pair in MAIN_PAIRS and concurrency in REFERENCE_CONCURRENCIES
    return engine == PLUGIN or (engine == ADAPTIVE and pair in MAIN_PAIRS)


def _ar_cell(concurrency: int, length: int) -> Cell:
    return Cell(AR, _columns(concurrency, None, None), _load(concurrency, length))


def _cell(engine: str, concurrency: int, pair: tuple[int, int], length: int) -> Cell:
    load = replace(_load(concurrency, length), options=fixed_schedule(*pair))
    return Cell(engine, _columns(concurrency, *pair), load)


def _columns(
    concurrency: int, block_length: int | None, tokens_per_forward: int | None
) -> dict[str, Value]:
    return {
        "block length": block_length,
        "tokens per forward": tokens_per_forward,
        "concurrency": concurrency,
    }


def _load(concurrency: int, length: int) -> Load:
    return Load(concurrency, max(2, concurrency), length, length)
