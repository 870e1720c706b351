"""Answers every row of a JSONL or Parquet file, with one engine or many, on Ray Data.

The input is cut into shards of rows. A shard's answers become one file of the output folder, there
whole or not at all; the same command started again, after whatever end, does what is missing.

Usage: python -m examples.ray_batch MODEL INPUT OUTPUT [--replicas N] ...
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray.exceptions import RayError
from tqdm import tqdm

from examples.batch.formats import FORMATS, Row, unfinished_shards
from examples.batch.output import digest, done_shards, open_output
from examples.batch.rows import check_names, is_read
from examples.batch.sampling import DEFAULTS, DIFFUSION, OPTIONS, sampling_of
from vllm_edlm.evaluate.checkpoint import checkpoint_options
from vllm_edlm.jsonl import json_object
from vllm_edlm.options import Options, check_keys, request_options

STARTS = 4
# Of a shard whose replica died under it, as by a machine that is gone.
RETRIES = 3
# Shards that a replica works on together, and those that it has in all.
SHARDS_AT_WORK, SHARDS_AT_HAND = 2, 3
# Reading is little work, but Ray would do it inside the replicas if it asked for as much as they.
READER_CPUS = 0.1
# Shards that wait for a replica fill up to half of it; then Ray Data reads no more of them, or one
# every 10 s if none is done for so long.
OBJECT_STORE_BYTES = 256 * 2**20
# Ray gives a replica as many threads as CPUs; the engine must not tie them all to the same cores.
REPLICA_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def batch(
    model: Annotated[str, typer.Argument(help="block-diffusion model: a directory or a hub name")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=".jsonl or .parquet")],
    output: Annotated[Path, typer.Argument(help="folder, new or of the same command")],
    replicas: Annotated[int, typer.Option(min=1, help="engines")] = 1,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="rows of an output file")] = 512,
    defaults: Annotated[
        str, typer.Option(help='options of rows that name none, such as {"max_tokens": 64}')
    ] = "{}",
    engine_args: Annotated[
        str, typer.Option(help='vLLM\'s engine arguments, such as {"dtype": "bfloat16"}')
    ] = "{}",
    prefix: Annotated[str, typer.Option(help="of the names of what is added to rows")] = "",
    cpus_per_replica: Annotated[int, typer.Option(min=1, help="and threads, on CPUs")] = 1,
    gpus_per_replica: Annotated[
        int | None, typer.Option(min=0, help="none: 1 where the cluster has GPUs, else 0")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster; none: Ray starts here for this job"),
    ] = None,
) -> None:
    """Answer every row of a file: rows in; rows, answer, finish reason, tokens and forwards out."""
    with _reported_errors():
        options = DEFAULTS | json_object("--defaults", defaults)
        arguments = json_object("--engine-args", engine_args)
        _check_options(model, options, arguments)
        manifest = _manifest(model, source, rows_per_shard, prefix) | {
            "defaults": options,
            "engine_args": arguments,
        }
        open_output(output, manifest)
        todo = _missing(output, manifest)
        if todo:
            _start_ray(address, replicas * cpus_per_replica)
            gpus = _has_gpus() if gpus_per_replica is None else gpus_per_replica
            from examples.batch.replica import Job

            job = Job(_place(model), source.suffix, output.resolve(), options, arguments, prefix)
            read = partial(
                unfinished_shards, done=set(done_shards(output)), num_rows=rows_per_shard
            )
            shards = _shards(job, read, source.resolve(), replicas, cpus_per_replica, gpus)
            _follow(shards, manifest["rows"], todo)
            if missing := _missing(output, manifest):
                raise ValueError(f"{missing} rows are missing in {output}; did {source} change?")
    typer.echo(f"{output} holds all {manifest['rows']} rows")


def _check_options(model: str, defaults: Row, engine_args: Row) -> None:
    """Refuse what no engine would start with, and what would be an error of every row."""
    from vllm import AsyncEngineArgs

    for name in engine_args.keys() - {field.name for field in fields(AsyncEngineArgs)}:
        raise ValueError(f"--engine-args: vLLM has no engine argument {name!r}")
    diffusion = engine_args.get("diffusion_config")
    length = diffusion.get("canvas_length") if isinstance(diffusion, dict) else None
    _check_defaults(defaults, checkpoint_options(model, block_length=length))


def _check_defaults(defaults: Row, served: Options) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    names = (*OPTIONS, *(name for name in defaults if name.startswith(DIFFUSION)))
    check_keys(defaults, names, "--defaults")
    try:
        request_options(SamplingParams(**sampling_of(defaults)).extra_args, served)
    except (ValueError, VLLMClientError) as error:
        raise ValueError(f"--defaults: {error}") from error


def _manifest(model: str, source: Path, rows_per_shard: int, prefix: str) -> Row:
    """What the output depends on, but for options."""
    if source.suffix not in FORMATS:
        raise ValueError(f"{source}: its name must end with {' or '.join(FORMATS)}")
    if not source.is_file():
        raise ValueError(f"input {source} does not exist")
    try:
        num_rows = FORMATS[source.suffix].count(source)
        _say_what_is_not_read(FORMATS[source.suffix].names(source), prefix)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not num_rows:
        raise ValueError(f"{source}: no rows in it")
    return {
        "input": digest(source),
        "model": digest(Path(model)) if Path(model).is_dir() else model,
        "rows": num_rows,
        "rows_per_shard": rows_per_shard,
        "prefix": prefix,
    }


def _say_what_is_not_read(names: Sequence[str], prefix: str) -> None:
    # An option that is misspelt is among them.
    check_names(names, prefix)
    if unread := [repr(name) for name in names if not is_read(name)]:
        typer.echo(f"not read, only passed through: {', '.join(unread)}", err=True)


def _missing(output: Path, manifest: Row) -> int:
    return int(manifest["rows"]) - sum(done_shards(output).values())


def _place(model: str) -> str:
    """The model by a name that replicas know: they may run in other folders."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _start_ray(address: str | None, num_cpus: int) -> None:
    environment = {name: os.environ.get(name, text) for name, text in REPLICA_ENVIRONMENT.items()}
    here: Row = {
        "address": "local",
        "num_cpus": num_cpus + 1,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    where = {"address": address} if address else here
    arguments = where | {"runtime_env": {"env_vars": environment}}
    # Of a cluster that starts here; else the engine of a killed replica would live on.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    for tries_left in reversed(range(STARTS)):
        try:
            ray.init(**arguments, logging_level=logging.WARNING)
            return
        except Exception as error:
            ray.shutdown()
            # Ray gives a machine 30 s, which a busy one may exceed, and has no type for that.
            if not tries_left or "timed out during startup" not in str(error):
                raise ValueError(f"Ray does not start: {error}") from error


def _has_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0) > 0)


def _shards(
    job: Any,
    read: Callable[[Row], Iterator[Row]],
    source: Path,
    replicas: int,
    cpus: int,
    gpus: int,
) -> ray.data.Dataset:
    """A row for each shard, once it is done; see `Replica.__call__`."""
    from examples.batch.replica import Replica

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block is then a shard, whatever its size: replicas get them one by one.
    context.target_max_block_size = 1
    pool = ray.data.ActorPoolStrategy(
        size=replicas,
        max_concurrent_calls_per_actor=SHARDS_AT_WORK,
        max_tasks_in_flight_per_actor=SHARDS_AT_HAND,
    )
    return (
        ray.data.from_items([{"source": str(source)}])
        .flat_map(read, num_cpus=READER_CPUS)
        .map(
            Replica,  # type: ignore[arg-type]
            fn_constructor_args=(job,),
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=RETRIES,
        )
    )


def _follow(shards: ray.data.Dataset, num_rows: int, todo: int) -> None:
    """Run the job and show how far it is.

    Raises:
        OSError: a shard could not be written; those that are done stay.
    """
    total: dict[str, int] = {"errors": 0, "tokens": 0, "forwards": 0}
    with tqdm(total=num_rows, initial=num_rows - todo, unit="row", smoothing=0) as bar:
        for shard in shards.iter_rows():
            if shard["failure"]:
                raise OSError(f"{shard['failure']}; what is written stays, start again to go on")
            total = {name: count + shard[name] for name, count in total.items()}
            bar.set_postfix(total, refresh=False)
            bar.update(shard["rows"])


@contextmanager
def _reported_errors() -> Iterator[None]:
    # Said before Ray is shut down: its threads may end the process then, with status 1.
    try:
        yield
    except (ValueError, OSError, RayError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        ray.shutdown()


if __name__ == "__main__":
    app()
