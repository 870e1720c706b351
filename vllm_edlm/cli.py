"""The `edlm` command."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class _Noise(StrEnum):
    position = "position"
    uniform = "uniform"


class _Layout(StrEnum):
    efficient_dlm = "efficient_dlm"
    plain = "plain"


class _Attention(StrEnum):
    sdpa = "sdpa"
    flex_attention = "flex_attention"


@app.callback()
def edlm() -> None:
    """Block-diffusion language models: convert AR models to them, measure how fast they serve."""


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="AR model: a directory or a hub name")],
    data: Annotated[Path, typer.Option(help=".jsonl (prompt/response or text) or .txt")],
    output: Annotated[Path, typer.Option(help="where the checkpoint is written; resumes there")],
    block_length: Annotated[int, typer.Option(min=1, help="tokens denoised together")] = 16,
    half_life_ratio: Annotated[
        float, typer.Option(help="lambda of the position-dependent noise; smaller is stronger")
    ] = 0.1,
    noise: Annotated[_Noise, typer.Option(help="how tokens are masked")] = _Noise.position,
    noise_copies: Annotated[
        int, typer.Option(min=1, help="differently masked copies of a row in one forward")
    ] = 1,
    mask_token_id: Annotated[
        int | None, typer.Option(help="default: the tokenizer's, else a new token")
    ] = None,
    row_length: Annotated[
        int, typer.Option(min=1, help="tokens of a packed row; a multiple of the block length")
    ] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per device and step")] = 8,
    learning_rate: Annotated[float, typer.Option(help="peak, after warm-up")] = 1e-5,
    min_learning_rate_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="where the cosine ends, as a share of the peak")
    ] = 0.3,
    warmup_steps: Annotated[int, typer.Option(min=0)] = 100,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.0,
    save_steps: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 500,
    seed: Annotated[int, typer.Option()] = 0,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast; weights stay fp32")] = True,
    compile: Annotated[bool, typer.Option(help="torch.compile the backbone")] = False,
    layout: Annotated[_Layout, typer.Option(help="weight names")] = _Layout.efficient_dlm,
    attention: Annotated[
        _Attention, typer.Option(help="flex_attention needs no mask tensor, but a GPU")
    ] = _Attention.sdpa,
) -> None:
    """Convert an AR model to block diffusion by the Efficient-DLM recipe (arXiv 2512.14067)."""
    options = dict(locals())  # torch is imported only now, so that `--help` answers at once
    from vllm_edlm.train.convert import Recipe
    from vllm_edlm.train.convert import convert as run
    from vllm_edlm.train.trainer import TrainingDivergedError

    try:
        run(Recipe(**options))
    except (ValueError, TrainingDivergedError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


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


if __name__ == "__main__":
    app()
