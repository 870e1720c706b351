"""One run of `edlm bench`: table after table, each written as soon as it is made."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_edlm.bench.engine import run_apart
from vllm_edlm.bench.environment import Environment
from vllm_edlm.bench.machine import facts, measure_rates
from vllm_edlm.bench.report import write
from vllm_edlm.bench.settings import Settings
from vllm_edlm.bench.shapes import Shape
from vllm_edlm.bench.tables import TABLES, maker


def run(
    tables: Sequence[str],
    output: Path,
    command: str,
    *,
    quick: bool,
    rounds: int,
    warm_start: bool,
) -> list[Path]:
    """Make tables and write them.

    Args:
        tables: names; none: all.
        output: folder for the results.
        command: what the user typed, for the tables' heads.
        quick: tiny shapes and few cells.
        rounds: how often every figure is measured.
        warm_start: engines may find what earlier runs compiled.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown table; nothing has been measured then.
        FileNotFoundError: a model that a table needs is not there.
    """
    makers = [maker(name) for name in tables or TABLES]
    paths = []
    with tempfile.TemporaryDirectory() as work:
        settings = _settings(Path(work), quick, rounds, warm_start)
        head = facts(command) | settings.rates.facts() | {"processes": str(settings.environment)}
        for make in makers:
            paths += write(make(settings), head, output)
    return paths


def _settings(work: Path, quick: bool, rounds: int, warm_start: bool) -> Settings:
    environment = Environment(cache=None if warm_start else work / "cache")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = run_apart(environment, measure_rates, device, Shape().dtype)
    return Settings(environment, work, rates, quick, rounds)
