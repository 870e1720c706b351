"""The OpenAI API over replicas of one model, on Ray Serve's own classes for language models.

    python -m examples.ray_serve --min-replicas 1 --max-replicas 4       until SIGTERM or Ctrl-C
    serve run examples.ray_serve:app model=DIR accelerator=gpu           Ray's own command

Each replica is one vLLM engine. Ray routes requests, checks replicas' health, starts others in
place of dead ones, adds and removes them with the load, and lets those that it removes finish
their requests. Nothing here does any of that itself.

The command connects to the cluster that RAY_ADDRESS names or this machine belongs to, else it
starts one on this machine.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import typer
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.llm import LLMConfig, LLMServer, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from examples.ray_options import Options, errors_said, with_options

APP = "vllm-edlm"
GIB = 2**30


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


class Replica(LLMServer):
    """Ray's replica, which answers /tokenize and /detokenize too.

    Ray's own looks for what answers them under a name that vLLM no longer uses.
    """

    async def start(self) -> None:
        """Start the engine."""
        await super().start()
        engine: Any = self.engine
        engine._oai_serving_tokenization = engine._app_state.serving_tokenization


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
        server_cls=Replica,
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
    with errors_said():
        options = Options(**values)
        llm_config(options).get_engine_config()
        # Of a cluster that starts here; else the engine of a killed replica would live on.
        os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
        ray.init()
        listen(host, port, proxies)
        _run(options, f"http://{host}:{port}/v1")


def listen(host: str, port: int, proxies: str) -> None:
    """Start Serve, if it does not run on the cluster already.

    Raises:
        ValueError: it runs and listens elsewhere, which it goes on doing whatever it is told.
    """
    wanted = {"host": host, "port": port, "proxies": proxies}
    for option, found in _listening().items():
        if found != wanted[option]:
            raise ValueError(
                f"{option} is {found!r} of Serve, which runs on this cluster already, "
                f"got {wanted[option]!r}"
            )
    serve.start(http_options={"host": host, "port": port}, proxy_location=proxies)


def _listening() -> dict[str, Any]:
    """Where Serve listens; nothing if it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    location = ray.get(client._controller.get_proxy_location.remote())
    http = client.http_config
    return {"host": http.host, "port": http.port, "proxies": location and location.value}


def _run(options: Options, address: str) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain."""
    # As Ctrl-C; Ray has set a handler of its own, which drains nothing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(app(options), name=APP)
        typer.echo(f"Ready: {address}")
        while True:
            signal.pause()
    except KeyboardInterrupt:
        typer.echo("Draining.")
    finally:
        drain()


def drain() -> None:
    """Take the application away as its requests have finished, and Serve if it has no other."""
    while APP in serve.status().applications:
        with suppress(TimeoutError):  # Ray waits for a minute, of no matter how many.
            serve.delete(APP)
    if not serve.status().applications:
        serve.shutdown()


cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
cli.command()(with_options(serve_until_told))

if __name__ == "__main__":
    cli()
