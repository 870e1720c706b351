"""The `edlm` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vllm_edlm.evaluate.commands import app as evaluate
from vllm_edlm.train.command import convert

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def edlm() -> None:
    """Block-diffusion language models: convert AR models to them, measure how fast they serve."""


app.command()(convert)
app.add_typer(evaluate, name="eval")


@app.command()
def bench(
    tables: Annotated[
        list[str] | None, typer.Argument(help="names of tables; none: all", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for the tables")] = Path(
        "benchmarks/results"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="a tiny shape and few cells: does it run?")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="times that every figure is measured")] = 2,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="use what vLLM compiled in earlier runs")
    ] = False,
) -> None:
    """Measure speed and memory against vLLM's AR serving and a plain reference loop."""
    from vllm_edlm.bench.engine import EngineError
    from vllm_edlm.bench.run import run

    words = ["edlm", "bench", *(tables or []), "--rounds", str(rounds)]
    words += ["--quick"] * quick + ["--warm-start"] * warm_start
    try:
        paths = run(
            tables or [],
            output,
            shlex.join(words),
            quick=quick,
            rounds=rounds,
            warm_start=warm_start,
        )
    except (ValueError, FileNotFoundError, EngineError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for path in paths:
        typer.echo(path)


@app.command()
def capacity(
    results: Annotated[Path, typer.Option(help="folder of the measured tables")] = Path(
        "benchmarks/results"
    ),
    output: Annotated[Path, typer.Option(help="the page")] = Path("benchmarks/capacity.md"),
    fraction: Annotated[
        float, typer.Option(help="of the roofline that planned figures assume")
    ] = 0.5,
) -> None:
    """Write what a step costs, as measured, and what an 8B would serve on H100s, as computed."""
    from vllm_edlm.bench.capacity_page import page

    try:
        text = page(results, fraction)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    typer.echo(output)


if __name__ == "__main__":
    app()
