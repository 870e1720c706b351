"""The commands of `edlm eval`. What they need is imported when they run, so that help is quick."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_edlm.evaluate.questions import Grader, Match, read_questions
from vllm_edlm.jsonl import json_object

if TYPE_CHECKING:
    from vllm_edlm.bench.report import Table
    from vllm_edlm.evaluate.grid import Cell

# As the paper's evaluation has it (arXiv 2512.14067).
DEFAULT_MAX_TOKENS = 512

app = typer.Typer(no_args_is_help=True, help="Measure a model as it is served.")

Model = Annotated[str, typer.Argument(help="block-diffusion model: a directory or a hub name")]
Output = Annotated[Path, typer.Option(help="folder for JSON, Markdown and plot")]
Data = Annotated[Path | None, typer.Option(help="JSONL with prompt and answer (or response)")]
Limit = Annotated[int | None, typer.Option(min=1, help="questions at most, the first ones")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--reveal", help="reveal rule; again for more; none: confidence"),
]
Thresholds = Annotated[
    list[float] | None,
    typer.Option("--threshold", help="of the rules; again for more; none: each rule's default"),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--block-length", min=1, help="again for more; none: the checkpoint's"),
]
Steps = Annotated[
    list[int] | None,
    typer.Option("--max-steps", min=1, help="denoise steps of a block; again for more"),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="of an answer; none: 512, or what a task says")
]
Chat = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="use the tokenizer's chat template")
]
EngineArgs = Annotated[
    str, typer.Option(help='vLLM\'s engine arguments as JSON, such as {"dtype": "bfloat16"}')
]


@app.command()
def accuracy(
    model: Model,
    output: Output,
    data: Data = None,
    match: Annotated[
        Match | None, typer.Option(help="what of an answer must be right; none: exact")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="for --match regex; its last match, first group, counts")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="in place of --data: lm-evaluation-harness task")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="of the tasks' prompts")] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder with more tasks")] = None,
    limit: Limit = None,
    reveal: Rules = None,
    threshold: Thresholds = None,
    block_length: Lengths = None,
    max_steps: Steps = None,
    ar: Annotated[str | None, typer.Option(help="AR parent, measured as well")] = None,
    max_tokens: MaxTokens = None,
    chat: Chat = None,
    engine_args: EngineArgs = "{}",
) -> None:
    """Accuracy against tokens per forward, over all combinations of the options given."""
    with _reported_errors():
        from vllm_edlm.evaluate.checkpoint import check_autoregressive

        arguments = json_object("--engine-args", engine_args)
        served_length, cells = _grid(model, reveal, threshold, block_length, max_steps)
        if ar is not None:
            check_autoregressive(ar)
        if data is not None:
            _refuse("--data", task=task, num_fewshot=num_fewshot, include_path=include_path)
            exam: Any = _question_exam(data, limit, match, pattern, max_tokens, chat)
        else:
            _refuse("--task", match=match, pattern=pattern)
            exam = _task_exam(task, limit, num_fewshot, include_path, max_tokens, chat)
        from vllm_edlm.evaluate.accuracy import accuracy_table

        _write(accuracy_table(exam, model, ar, cells, served_length, arguments), output)


@app.command()
def drift(
    model: Annotated[Path, typer.Argument(help="directory of the converted model")],
    ar: Annotated[Path, typer.Option(help="directory of its AR parent")],
    output: Output,
) -> None:
    """Mean and relative weight change of every layer's attention, FFN and norms."""
    with _reported_errors():
        from vllm_edlm.evaluate.drift import drift_table

        _write(drift_table(model, ar), output)


@app.command()
def order(
    model: Model,
    data: Annotated[Path, typer.Option(help="JSONL with prompts, as for accuracy")],
    output: Output,
    limit: Limit = None,
    reveal: Rules = None,
    threshold: Thresholds = None,
    block_length: Lengths = None,
    max_steps: Steps = None,
    max_tokens: MaxTokens = None,
    chat: Chat = None,
    engine_args: EngineArgs = "{}",
) -> None:
    """When each position of a block is revealed: mask-order statistics."""
    with _reported_errors():
        prompts = [question.prompt for question in read_questions(data, limit)]
        arguments = json_object("--engine-args", engine_args)
        served_length, cells = _grid(model, reveal, threshold, block_length, max_steps)
        from vllm_edlm.evaluate.order import order_table

        length = max_tokens or DEFAULT_MAX_TOKENS
        _write(order_table(model, prompts, cells, served_length, length, chat, arguments), output)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def harness(context: typer.Context) -> None:
    """The `lm_eval` command, which here knows the model `edlm`: run, ls, validate, --help."""
    with _reported_errors():
        from vllm_edlm.evaluate.harness import run_command

        run_command(context.args)


@contextmanager
def _reported_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error}; install vllm-edlm with its extra 'eval'", err=True)
        raise typer.Exit(1) from error


def _grid(
    model: str,
    rules: list[str] | None,
    thresholds: list[float] | None,
    block_lengths: list[int] | None,
    max_steps: list[int] | None,
) -> tuple[int, list["Cell"]]:
    """The block length to serve with, and the cells."""
    from vllm_edlm.evaluate.checkpoint import checkpoint_options
    from vllm_edlm.evaluate.grid import grid

    options = checkpoint_options(model, max(block_lengths) if block_lengths else None)
    cells = grid(
        options, rules or ["confidence"], thresholds or [], block_lengths or [], max_steps or []
    )
    return options.block_length, cells


def _refuse(source: str, **options: Any) -> None:
    """Refuse options that have no meaning for a source of questions."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {source}")


def _question_exam(
    path: Path,
    limit: int | None,
    match: Match | None,
    pattern: str | None,
    max_tokens: int | None,
    chat: bool | None,
) -> Any:
    questions = read_questions(path, limit)
    match = match or Match.exact
    grader = Grader.of(match, pattern)
    grader.check(questions)
    from vllm_edlm.evaluate.accuracy import QuestionExam

    length = max_tokens or DEFAULT_MAX_TOKENS
    return QuestionExam(path.name, match.value, questions, grader, length, chat)


def _task_exam(
    names: list[str] | None,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    max_tokens: int | None,
    chat: bool | None,
) -> Any:
    if not names:
        raise ValueError("give either --data or --task")
    from vllm_edlm.evaluate.tasks import TaskExam

    return TaskExam.load(
        names,
        include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        gen_kwargs={"max_gen_toks": max_tokens} if max_tokens is not None else None,
        apply_chat_template=bool(chat),
        fewshot_as_multiturn=bool(chat),
    )


def _write(table: "Table", output: Path) -> None:
    """Write a table with the circumstances it was made in, and say where."""
    from vllm_edlm.bench.machine import facts
    from vllm_edlm.bench.report import write

    for path in write(table, facts(shlex.join(["edlm", *sys.argv[1:]])), output):
        typer.echo(path)
