"""Reproduce the paper's findings in miniature: train, measure, write the tables.

Run it again to go on after a stop: what is trained or measured already is taken from `--runs`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

RUNS, RESULTS = Path("runs/findings"), Path("benchmarks/results/findings")


def main(
    runs: Annotated[Path, typer.Option(help="where models and answers are kept")] = RUNS,
    output: Annotated[Path, typer.Option(help="folder for the tables")] = RESULTS,
    train: Annotated[
        bool, typer.Option(help="--no-train: measure what has been trained so far")
    ] = True,
) -> None:
    """Train every conversion of the plan, measure all as served, write one table a finding."""
    torch.set_num_threads(1)  # more threads only get into the way of so small a model
    # Engines run in this process, on its one thread.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    from benchmarks.findings.run import measure_all, train_all, write_tables

    if train:
        train_all(runs)
    write_tables(measure_all(runs), runs, output)


if __name__ == "__main__":
    typer.run(main)
