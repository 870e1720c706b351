"""What `examples.ray_serve` can be told, on its command line or as an application's arguments."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator
from pydantic_core import ErrorDetails

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"


class Options(BaseModel):
    """What `app` takes, from `serve run`'s NAME=VALUE or a Serve config's `args`.

    Raises:
        pydantic.ValidationError: it names each wrong option, its value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(str(TINY_MATH), description="folder or hub name of the checkpoint")
    name: str = Field("", description="the model's name for clients; else the folder's")
    min_replicas: int = Field(1, ge=1, description="replicas without load")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    target_requests: int = Field(16, ge=1, description="requests a replica that Ray scales for")
    upscale_seconds: float = Field(10, ge=0, description="load lasts so long: a replica more")
    downscale_seconds: float = Field(300, ge=0, description="lull lasts so long: a replica less")
    drain_seconds: float = Field(120, ge=0, description="a removed replica has, to finish")
    health_seconds: float = Field(10, gt=0, description="between health checks of a replica")
    health_timeout_seconds: float = Field(30, gt=0, description="one without answer has failed")
    prefix_routing: bool = Field(False, description="like prompts to like replicas")
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what replicas run on")
    accelerator_type: str = Field("", description="Ray's name of the GPU, such as H100")
    tensor_parallel_size: int = Field(1, ge=1, description="devices of a replica")
    cpus: int = Field(1, ge=1, description="cores of a replica; on a CPU, of its forwards")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="of a device; else 1 on a CPU, what vLLM finds free on a GPU"
    )
    engine_args: Json[dict[str, Any]] = Field(
        "{}", validate_default=True, description="vLLM's engine arguments, as a JSON object"
    )

    @model_validator(mode="after")
    def _together(self) -> "Options":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas, {self.min_replicas}, "
                f"got {self.max_replicas}"
            )
        if self.accelerator == "cpu" and self.accelerator_type:
            raise ValueError(
                f"accelerator_type is for accelerator=gpu alone, got {self.accelerator_type!r}"
            )
        return self


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of **values, an option for each field of `Options`."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in Options.model_fields.items():
        kind = str if name == "engine_args" else field.annotation
        option = Annotated[kind, typer.Option(help=field.description)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=option
            )
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@contextmanager
def errors_said() -> Iterator[None]:
    """End the command with what was wrong, each wrong option on a line of its own."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        lines = [str(error)]
        if isinstance(error, ValidationError):
            lines = [_line(details) for details in error.errors()]
        typer.echo("\n".join(f"error: {line}" for line in lines), err=True)
        raise typer.Exit(2) from error


def _line(details: ErrorDetails) -> str:
    where = ".".join(map(str, details["loc"]))
    return f"{where}: {details['msg']}, got {details['input']!r}" if where else details["msg"]
