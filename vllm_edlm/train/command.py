"""`edlm convert`: its options. torch is imported only when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

_data = partial(typer.Option, rich_help_panel="Data")
_objective = partial(typer.Option, rich_help_panel="Objective")
_optimiser = partial(typer.Option, rich_help_panel="Optimiser")
_machine = partial(typer.Option, rich_help_panel="Machine")
_result = partial(typer.Option, rich_help_panel="Result")


def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="AR model: a directory or a hub name")],
    data: Annotated[
        str,
        _data(
            help="file or folder of .jsonl, .parquet, .txt, or a hub data set; rows with "
            "messages, prompt and response, or text"
        ),
    ],
    output: Annotated[Path, _result(help="where the checkpoint is written; resumes there")],
    data_split: Annotated[str, _data(help="split of a hub data set")] = "train",
    data_subset: Annotated[str | None, _data(help="subset of a hub data set")] = None,
    row_length: Annotated[
        int, _data(min=1, help="tokens of a packed row; a multiple of the block length")
    ] = 1024,
    shuffle_buffer: Annotated[
        int, _data(min=0, help="documents to draw the next one from; 0: in order")
    ] = 1000,
    skip_long: Annotated[
        bool, _data("--skip-long", help="leave out prompts with answers that are longer than a row")
    ] = False,
    block_length: Annotated[int, _objective(min=1, help="tokens denoised together")] = 16,
    mask_token_id: Annotated[
        int | None, _objective(help="default: the tokenizer's, else a new token")
    ] = None,
    noise: Annotated[
        Literal["position", "uniform"],
        _objective(help="later positions of a block masked more, or all alike"),
    ] = "position",
    half_life_ratio: Annotated[
        float, _objective(help="lambda of the position-dependent noise; smaller is stronger")
    ] = 0.1,
    noise_copies: Annotated[
        int, _objective(min=1, help="differently masked copies of a row in one forward")
    ] = 1,
    pattern: Annotated[
        Literal["block_clean", "block_noisy", "bidirectional"],
        _objective(
            help="what a noisy block sees: clean blocks before it, noisy ones, or the whole "
            "noisy document"
        ),
    ] = "block_clean",
    token_shift: Annotated[
        bool, _objective("--token-shift", help="predict a position from the one before it")
    ] = False,
    ar_loss_weight: Annotated[
        float, _objective(help="weight of a next-token loss on clean tokens, token-causal then")
    ] = 0.0,
    growth: Annotated[
        str,
        _objective(
            help="block lengths for equal shares of the steps, such as 4,8,16; the last is the "
            "block length"
        ),
    ] = "",
    teacher: Annotated[
        str | None,
        _objective(help="block-diffusion checkpoint to learn from, say of shorter blocks"),
    ] = None,
    distillation_weight: Annotated[
        float, _objective(help="with a teacher: its share in the loss, 0 to 1")
    ] = 0.5,
    steps: Annotated[int, _optimiser(min=1, help="optimizer steps")] = 1000,
    batch_size: Annotated[int, _optimiser(min=1, help="rows per device and forward")] = 8,
    accumulate: Annotated[int, _optimiser(min=1, help="forwards per optimizer step")] = 1,
    learning_rate: Annotated[float, _optimiser(help="peak, after warm-up")] = 1e-5,
    schedule: Annotated[
        Literal["cosine", "wsd"],
        _optimiser(help="after warm-up: a cosine, or constant with a decay at the end"),
    ] = "cosine",
    warmup_steps: Annotated[
        int | None, _optimiser(min=0, help="steps up to the peak; default: a tenth, 100 at most")
    ] = None,
    min_learning_rate_ratio: Annotated[
        float, _optimiser(min=0, max=1, help="where the schedule ends, as a share of the peak")
    ] = 0.3,
    decay_ratio: Annotated[
        float, _optimiser(min=0, max=1, help="share of the steps that wsd decays in")
    ] = 0.2,
    weight_decay: Annotated[float, _optimiser(min=0, help="of AdamW")] = 0.0,
    max_grad_norm: Annotated[
        float, _optimiser(min=0, help="gradients are clipped to; 0: never")
    ] = 1.0,
    lora_rank: Annotated[
        int | None, _optimiser(help="train adapters of this rank in place of the linear layers")
    ] = None,
    lora_alpha: Annotated[float, _optimiser(help="strength of the adapters")] = 32.0,
    seed: Annotated[int, _optimiser(help="of noise and order")] = 0,
    bf16: Annotated[bool, _machine(help="bf16 autocast; weights stay fp32")] = True,
    attention: Annotated[
        Literal["auto", "flex", "sdpa", "xformers"],
        _machine(help="auto: flex on a GPU, else sdpa in tiles"),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, _machine("--gradient-checkpointing", help="less memory for a third more computation")
    ] = False,
    fsdp: Annotated[
        bool,
        _machine(
            "--fsdp", help="shard the model over the processes of torchrun or accelerate launch"
        ),
    ] = False,
    compile: Annotated[bool, _machine(help="torch.compile the backbone")] = False,
    save_steps: Annotated[int, _result(min=1, help="steps between checkpoints")] = 500,
    log_steps: Annotated[int, _result(min=1, help="steps between lines of the log")] = 25,
    log_to: Annotated[
        Literal["none", "tensorboard"], _result(help="beside the log on the screen")
    ] = "none",
    layout: Annotated[
        Literal["efficient_dlm", "plain"], _result(help="weight names of the export")
    ] = "efficient_dlm",
    dtype: Annotated[
        Literal["bfloat16", "float32"], _result(help="of the exported weights")
    ] = "bfloat16",
    check: Annotated[
        bool, _result("--check", help="compare logits of export and trained model")
    ] = False,
    dry_run: Annotated[
        bool, _result("--dry-run", help="only show tokens, steps, memory and time")
    ] = False,
) -> None:
    """Convert an AR model to block diffusion by the Efficient-DLM recipe (arXiv 2512.14067)."""
    options = {name: value for name, value in locals().items() if name not in _NOT_OF_THE_RECIPE}
    _refuse_idle(context, options)
    options["growth"] = _lengths(growth)
    _run(options, check=check, is_dry=dry_run)


_NOT_OF_THE_RECIPE = ("context", "check", "dry_run")


def recipe_defaults() -> dict[str, Any]:
    """What a recipe is made of, each with the command's default, but for what has none."""
    return {
        name: parameter.default
        for name, parameter in signature(convert).parameters.items()
        if name not in _NOT_OF_THE_RECIPE and parameter.default is not parameter.empty
    }


# An option, the one that it belongs to, and the value that this must have (None: any).
_BELONGS = (
    ("half_life_ratio", "noise", "position"),
    ("decay_ratio", "schedule", "wsd"),
    ("lora_alpha", "lora_rank", None),
    ("distillation_weight", "teacher", None),
)


def _refuse_idle(context: typer.Context, options: dict[str, Any]) -> None:
    """Refuse an option that was given where it changes nothing."""
    for name, other, value in _BELONGS:
        source = context.get_parameter_source(name)
        idle = options[other] is None if value is None else options[other] != value
        if idle and source is not None and source.name != "DEFAULT":
            needed = _flag(other) + (f" {value}" if value else "")
            raise typer.BadParameter(f"has no meaning without {needed}", param_hint=_flag(name))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _lengths(growth: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in growth.split(",") if growth)
    except ValueError as error:
        raise typer.BadParameter(
            f"must be block lengths such as 4,8,16, got {growth!r}", param_hint="--growth"
        ) from error


def _run(options: dict[str, Any], check: bool, is_dry: bool) -> None:
    try:
        from vllm_edlm.train import convert
        from vllm_edlm.train.checkpoints import CheckpointError
        from vllm_edlm.train.recipe import Recipe
        from vllm_edlm.train.trainer import TrainingDivergedError
    except ModuleNotFoundError as error:
        _fail(f"{error}; install vllm-edlm with its extra 'train'", error)

    try:
        if is_dry:
            _show(convert.dry_run(Recipe(**options)))
        elif report := convert.convert(Recipe(**options), check_export=check):
            typer.echo(report)
    except (ValueError, TrainingDivergedError, CheckpointError, OSError) as error:
        _fail(str(error), error)


def _show(plan: Any) -> None:
    from rich import print as show

    from vllm_edlm.train.plan import render

    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts
        show(render(plan))


def _fail(message: str, error: Exception) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1) from error
