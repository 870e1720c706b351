"""examples/serve.sh with API keys: each route of vLLM's server refuses, but /health."""

import logging
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from fastapi import FastAPI
from openai import AuthenticationError, OpenAI
from serving import environment
from starlette.routing import BaseRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from examples.demo import free_port, wait_until_healthy

SERVE = Path(__file__).parents[2] / "examples/serve.sh"
KEYS = ["first-key", "second-key"]
BEARER = {"Authorization": f"Bearer {KEYS[1]}"}
FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "64M", "--host", "127.0.0.1"]
Route = tuple[str, str]


@pytest.fixture(scope="module")
def address(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A random checkpoint served by the script with two keys."""
    log, port = tmp_path_factory.mktemp("guarded") / "log", str(free_port())
    command = [str(SERVE), str(checkpoint(CheckpointSpec())), *FLAGS, "--port", port]
    command += ["--api-key", *KEYS]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment()) as process,
    ):
        try:
            wait_until_healthy(process, address := f"http://127.0.0.1:{port}", log)
            yield address
        finally:
            process.terminate()


def arguments(*flags: str) -> Namespace:
    """What `vllm serve` makes of its flags."""
    return make_arg_parser(FlexibleArgumentParser()).parse_args(["some-model", *flags])


def routes_of(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """Method and path of each route; a mount is asked as it stands."""
    for route in routes:
        for method in getattr(route, "methods", None) or {"GET"}:
            yield method, getattr(route, "path", "/")


def application() -> FastAPI:
    """vLLM's, without an engine."""
    # vLLM's hosting package sets it for good, and other tests read warnings.
    level = logging.getLogger().level
    try:
        return build_app(arguments("--api-key", *KEYS), ("generate",))
    finally:
        logging.getLogger().setLevel(level)


def all_routes(address: str) -> list[Route]:
    """Every route of vLLM's application, and those that the running server documents."""
    documented = httpx.get(f"{address}/openapi.json", headers=BEARER).json()["paths"]
    shown = {(method.upper(), path) for path, item in documented.items() for method in item}
    return sorted(shown | set(routes_of(application().routes)))


def test_every_route_but_health_wants_a_key(address: str) -> None:
    routes = all_routes(address)
    paths = {path for _, path in routes}
    known = {"/v1/chat/completions", "/invocations", "/tokenize", "/metrics", "/docs", "/ping"}
    assert known | {"/health", "/version", "/load"} <= paths, paths
    with httpx.Client(base_url=address, timeout=60) as client:
        for method, path in routes:
            refused = path != "/health"
            status = client.request(method, path).status_code
            assert (status == 401) == refused, (method, path, status)
            wrong = client.request(method, path, headers={"Authorization": "Bearer x"})
            assert (wrong.status_code == 401) == refused, (method, path)


def test_with_a_key_every_route_is_there(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60, headers=BEARER) as client:
        for method, path in all_routes(address):
            # No body: what wants one says so in another way.
            assert client.request(method, path).status_code != 401, (method, path)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_good_for_an_answer(address: str, key: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key=key)
    (model,) = [model.id for model in client.models.list()]
    assert client.completions.create(model=model, prompt="ab", max_tokens=4).choices[0].text


def test_a_wrong_key_is_the_clients_authentication_error(address: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="third-key", max_retries=0)
    with pytest.raises(AuthenticationError, match="API key"):
        client.models.list()
