"""The OpenAI API over replicas of one model, on Ray Serve's own classes for language models.

    python -m examples.ray_serve --min-replicas 1 --max-replicas 4       until SIGTERM or Ctrl-C
    serve run examples.ray_serve:app model=DIR accelerator=gpu           Ray's own command

Each replica is one vLLM engine. Ray routes requests, checks replicas' health, starts others in
place of dead ones, adds and removes them with the load, and lets those that it removes finish
their requests. Nothing here does any of that itself.

The command connects to the cluster that RAY_ADDRESS names or this machine belongs to, else it
starts one on this machine.
"""

import inspect
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import ray
import typer
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"
APP = "vllm-edlm"
GIB = 2**30


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


class PromptRouter(PrefixCacheAffinityRouter):
    """Ray's router, with requests that hold no text, as prompts of token ids, sent anywhere.

    Ray's own raises on them while it routes, and they wait for ever.
    """

    def _extract_text_from_request(  # type: ignore[override]
        self, pending_request: Any
    ) -> str | None:
        try:
            return super()._extract_text_from_request(pending_request) or None
        except ValueError:  # It has neither a prompt nor messages.
            return None


def app(options: Options) -> Application:
    """Build the Serve application; Ray makes `options` of the arguments that it was given.

    Raises:
        ValueError: as `llm_config`, or vLLM has no such engine argument.
    """
    return build_openai_app(
        {
            "llm_configs": [llm_config(options)],
            # Whoever answers a request must outlive it as long as the replica that works on it.
            "ingress_deployment_config": {
                "graceful_shutdown_timeout_s": options.drain_seconds,
                "ray_actor_options": {"num_cpus": 0},
            },
        }
    )


def llm_config(options: Options) -> LLMConfig:
    """Ray's description of a model's replicas.

    Raises:
        ValueError: Ray knows no such accelerator, or an API key is set.
    """
    if os.environ.get("VLLM_API_KEY"):
        raise ValueError("VLLM_API_KEY is set, but Ray's routes ask for no key; guard them outside")
    on_cpu = options.accelerator == "cpu"
    device = {"CPU": options.cpus} if on_cpu else {"CPU": options.cpus, "GPU": 1}
    threads = {"OMP_NUM_THREADS": str(options.cpus), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return LLMConfig(
        model_loading_config={
            "model_id": options.name or Path(options.model).name,
            "model_source": _source(options.model),
        },
        accelerator_type=options.accelerator_type or None,
        # Without a GPU among them Ray runs vLLM's own executor, with one vLLM's Ray executor.
        placement_group_config={
            "bundle_per_worker": device,
            "strategy": "STRICT_PACK" if on_cpu else "PACK",
        },
        runtime_env={"env_vars": threads if on_cpu else {}},
        engine_kwargs=engine_kwargs(options),
        deployment_config=deployment_config(options),
    )


def _source(model: str) -> str:
    """The model by a name that replicas know: they run in other folders."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def engine_kwargs(options: Options) -> dict[str, Any]:
    """vLLM's engine arguments."""
    kv_cache_gib = options.kv_cache_gib or (1 if options.accelerator == "cpu" else None)
    size = {"kv_cache_memory_bytes": int(kv_cache_gib * GIB)} if kv_cache_gib else {}
    parallel = {"tensor_parallel_size": options.tensor_parallel_size}
    return {**size, **parallel, **options.engine_args}


def deployment_config(options: Options) -> dict[str, Any]:
    """What Serve does with replicas."""
    config: dict[str, Any] = {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
            "upscale_delay_s": options.upscale_seconds,
            "downscale_delay_s": options.downscale_seconds,
            # The load is averaged over no longer than it has to last.
            "look_back_period_s": max(options.upscale_seconds, 2),
        },
        "health_check_period_s": options.health_seconds,
        "health_check_timeout_s": options.health_timeout_seconds,
        "graceful_shutdown_timeout_s": options.drain_seconds,
        # The placement group holds the replica's resources.
        "ray_actor_options": {"num_cpus": 0},
    }
    if options.prefix_routing:
        config["request_router_config"] = RequestRouterConfig(
            request_router_class=PromptRouter,  # type: ignore[arg-type]
            # A replica that is busier than another by so much is spared.
            request_router_kwargs={
                "imbalanced_threshold": options.target_requests,
                "do_eviction": True,
            },
        )
    return config


def serve_until_told(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    proxies: Annotated[
        Literal["HeadOnly", "EveryNode"], typer.Option(help="nodes of the cluster that listen")
    ] = "EveryNode",
    **values: Any,
) -> None:
    """Serve a model over replicas until SIGTERM or Ctrl-C; then let requests in flight finish."""
    try:
        options = Options(**values)
        llm_config(options).get_engine_config()
    except ValueError as error:
        _give_up(error)
    # Of a cluster that starts here; else the engine of a killed replica would live on.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    ray.init()
    serve.start(http_options={"host": host, "port": port}, proxy_location=proxies)
    # As Ctrl-C; Ray has set a handler of its own, which drains nothing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(app(options), name=APP)
        typer.echo(f"Ready: http://{host}:{port}/v1")
        while True:
            signal.pause()
    except KeyboardInterrupt:
        typer.echo("Draining.")
    except RuntimeError as error:
        _give_up(error)
    finally:
        drain()


def drain() -> None:
    """Take the application away as its requests have finished, and Serve if it has no other."""
    while APP in serve.status().applications:
        with suppress(TimeoutError):  # Ray waits for a minute, of no matter how many.
            serve.delete(APP)
    if not serve.status().applications:
        serve.shutdown()


def _give_up(error: Exception) -> NoReturn:
    """End with the error, each wrong option on a line of its own."""
    lines = [str(error)]
    if isinstance(error, ValidationError):
        lines = [_line(details) for details in error.errors()]
    typer.echo("\n".join(f"error: {line}" for line in lines), err=True)
    raise typer.Exit(2)


def _line(details: ErrorDetails) -> str:
    where = ".".join(map(str, details["loc"]))
    return f"{where}: {details['msg']}, got {details['input']!r}" if where else details["msg"]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
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


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
cli.command()(_with_options(serve_until_told))

if __name__ == "__main__":
    cli()
