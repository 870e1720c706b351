"""The OpenAI API on Ray Serve: what clients see while replicas come, die and drain.

The tests share one cluster and run in order: each begins with what the one before left.
"""

import json
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from openai import APIError, BadRequestError
from serve_cluster import (
    APP,
    ENGINE,
    LIMIT_SECONDS,
    NAME,
    NODE,
    QUESTIONS,
    Service,
    expected,
    forget_controller,
    running,
    running_replicas,
    service,
    started,
    text_of,
)
from serve_load import Load, load, streamed, unstreamed
from typer.testing import CliRunner

from examples.demo import free_port
from examples.ray_serve import cli

# More than the two requests a replica that the application aims at.
CLIENTS = 6
ENGINE_END_SECONDS = 120
# What a request that fails says: Serve's error, or the end of its connection. A stream that Ray's
# proxy cuts off has no finish reason.
FAILURES = {"500", "502", "503", "no connection", "error in stream", "cut off"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-replicas", "3", "--max-replicas", "2"), "at least min_replicas, 3, got 2"),
        (("--accelerator-type", "H100"), "for accelerator=gpu alone, got 'H100'"),
        (("--accelerator", "gpu", "--accelerator-type", "x"), "Unsupported accelerator type: x"),
        (("--engine-args", "[1]"), "engine_args: Input should be a valid dictionary, got"),
        (("--engine-args", '{"blocks": 1}'), "Unknown engine argument: blocks"),
        (("--cpus", "0"), "cpus: Input should be greater than or equal to 1, got 0"),
        (("--port", "0"), "Invalid value for '--port'"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    """Said before anything is started."""
    done = CliRunner().invoke(cli, list(options))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not ray.is_initialized()


def test_api_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's routes would ignore it."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    done = CliRunner().invoke(cli, [])
    assert done.exit_code == 2
    assert "VLLM_API_KEY is set" in done.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("serve")) as answering:
        yield answering


@pytest.mark.parametrize(
    ("xargs", "meaning"),
    [
        ({}, {}),
        ({"diffusion_threshold": 0.5}, {"threshold": 0.5}),
        ({"diffusion_max_steps": 2}, {"max_steps": 2}),
        ({"diffusion_reveal": "prefix"}, {"rule": "prefix"}),
    ],
)
def test_answers_are_the_oracle_s(
    served: Service, xargs: dict[str, Any], meaning: dict[str, Any]
) -> None:
    for question in QUESTIONS[:2]:
        wanted = expected(question, **meaning)
        answer = text_of(wanted), wanted.finish_reason
        body = {"vllm_xargs": xargs, "return_token_ids": True}
        assert unstreamed(served.client, question, extra_body=body) == answer
        assert streamed(served.client, question, extra_body=body) == answer
        whole = served.ask(question, **body).json()
        assert whole["choices"][0]["token_ids"] == wanted.token_ids
        assert whole["usage"]["completion_tokens"] == len(wanted.token_ids)
        forwards = whole["metrics"]["speculative_decoding"]["num_spec_steps"]
        assert forwards == sum(wanted.denoise_steps)


BAD = {"vllm_xargs": {"diffusion_threshold": 2}}
REFUSAL = r"diffusion_threshold must be .*got 2"


def test_bad_requests_are_a_400(served: Service) -> None:
    with pytest.raises(BadRequestError, match=REFUSAL):
        unstreamed(served.client, QUESTIONS[0], extra_body=BAD)


def test_bad_streamed_requests_get_an_error_as_their_first_event(served: Service) -> None:
    """Ray answers 200 before the replica has looked at the request."""
    with pytest.raises(APIError, match=REFUSAL):
        streamed(served.client, QUESTIONS[0], extra_body=BAD)


def test_health(served: Service) -> None:
    """Of the proxy, for load balancers and Kubernetes."""
    assert httpx.get(f"{served.address}/-/healthz").text == "success"
    assert [model.id for model in served.client.models.list()] == [NAME]


def test_replicas_follow_the_load(served: Service) -> None:
    assert running_replicas() == 1
    with load(served, CLIENTS) as clients:
        served.wait_for(lambda: running_replicas() == 2, "a second replica")
        wait_for_answers(served, clients)
    assert set(clients.ended) == {"right"}, clients.failures
    assert len(served.replicas()) == 2


def wait_for_answers(served: Service, clients: Load) -> None:
    """Wait for more right answers than there are clients."""
    before = clients.right
    served.wait_for(lambda: clients.right > before + CLIENTS, "answers")


def engines(served: Service) -> set[psutil.Process]:
    """What runs below the replicas."""
    return {child for replica in served.replicas() for child in replica.children(recursive=True)}


def wait_for_another(served: Service, victim: psutil.Process) -> None:
    """Wait until a replica is replaced, and the new one runs."""
    served.wait_for(lambda: victim not in served.replicas(), "the replica's end")
    served.wait_for(lambda: len(served.replicas()) == 2, "another replica")
    served.wait_for(lambda: running_replicas() == 2, "another replica")


def test_killed_replica(served: Service) -> None:
    """SIGKILL under load: its requests fail clearly, or are retried, and it is replaced."""
    with load(served, CLIENTS // 2) as plain, load(served, CLIENTS // 2, 5) as patient:
        wait_for_answers(served, plain)
        victim = served.replicas()[0]
        engine = victim.children(recursive=True)
        assert engine, "an engine runs beside its replica"
        victim.kill()
        wait_for_another(served, victim)
        wait_for_answers(served, plain)
    for clients in (plain, patient):
        assert set(clients.ended) <= {"right"} | FAILURES, clients.failures
    alive = psutil.wait_procs(engine, timeout=ENGINE_END_SECONDS)[1]
    assert not alive, "the engine of a killed replica goes with it"


def test_dead_engine_fails_the_health_check(served: Service) -> None:
    """A replica whose engine died answers with errors until it is replaced."""
    with load(served, CLIENTS // 2, 5) as clients:
        wait_for_answers(served, clients)
        victim = served.replicas()[0]
        for process in victim.children(recursive=True):
            process.kill()
        wait_for_another(served, victim)
        wait_for_answers(served, clients)
    assert set(clients.ended) <= {"right"} | FAILURES, clients.failures


def test_killed_raylet(served: Service) -> None:
    """A node goes with its replica; the other one answers on."""
    with load(served, CLIENTS // 2) as clients:
        wait_for_answers(served, clients)
        before = engines(served)
        node = next(iter(served.cluster.worker_nodes))
        served.cluster.remove_node(node, allow_graceful=False)
        served.wait_for(lambda: len(served.replicas()) == 1, "the replica's end")
        wait_for_answers(served, clients)
    assert set(clients.ended) <= {"right"} | FAILURES, clients.failures
    gone = before - engines(served)
    assert gone, "a node's replica goes with it"
    assert not psutil.wait_procs(gone, timeout=ENGINE_END_SECONDS)[1], "and its engine"


def test_sigterm_drains(served: Service) -> None:
    """Answers that are being written are finished, new requests are refused, and all ends."""
    # Sixteen forwards a block.
    slow = {"vllm_xargs": {"diffusion_threshold": 1.0, "diffusion_reveal": "prefix"}}
    request = {
        "model": NAME,
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "temperature": 0,
        "max_tokens": 300,
        "extra_body": slow | {"ignore_eos": True},
    }
    wanted = expected(QUESTIONS[0], 300, threshold=1.0, rule="prefix", ignore_eos=True)
    streams = [served.client.chat.completions.create(**request, stream=True) for _ in range(4)]
    begun = ["".join(c.choices[0].delta.content or "" for c in islice(s, 2)) for s in streams]
    served.process.send_signal(signal.SIGTERM)
    ended = ["".join(c.choices[0].delta.content or "" for c in stream) for stream in streams]
    texts = [first + rest for first, rest in zip(begun, ended, strict=True)]
    assert texts == [text_of(wanted)] * len(streams)
    assert served.process.wait(LIMIT_SECONDS) == 0, served.log.read_text()[-5000:]
    with pytest.raises(httpx.TransportError):
        served.ask(QUESTIONS[0])
    assert not served.replicas()


@pytest.fixture(scope="module")
def prefix_routed(served: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """As a RayService of KubeRay has it: an import path, and options as arguments."""
    options = {"min_replicas": "2", "max_replicas": "2", "prefix_routing": "true"}
    options |= {"kv_cache_gib": "0.1", "engine_args": json.dumps(ENGINE)}
    application = {"name": APP, "import_path": "examples.ray_serve:app", "args": options}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": (port := free_port())},
        "applications": [application],
    }
    folder = tmp_path_factory.mktemp("config")
    (file := folder / "serve.yaml").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    # In place of the node that was killed; the router has a process of its own.
    started(lambda: served.cluster.add_node(wait=False, **NODE, num_cpus=2))
    forget_controller()
    with running(served.cluster, folder / "log", command, port) as service:
        service.wait_for(lambda: _answers(service) and running_replicas() == 2, "start")
        yield service


def _answers(service: Service) -> bool:
    try:
        return httpx.get(f"{service.address}/v1/models", timeout=LIMIT_SECONDS).is_success
    except httpx.TransportError:
        return False


def test_prompts_go_where_their_beginning_is_cached(prefix_routed: Service) -> None:
    """Of two replicas, a second prompt with the same beginning meets the one that has it."""
    for name in ("Ada", "Bob", "Cem", "Dan", "Eva", "Flo", "Gus", "Hal", "Ida", "Jim"):
        beginning = f"{name} has " + ", ".join(f"{i} pens" for i in range(len(name), 40)) + ". "
        first = prefix_routed.ask(beginning + QUESTIONS[0])
        second = prefix_routed.ask(beginning + QUESTIONS[1])
        cached = [r.json()["usage"]["prompt_tokens_details"] for r in (first, second)]
        assert not (cached[0] or {}).get("cached_tokens"), name
        assert cached[1]["cached_tokens"] >= 64, name


def test_requests_without_text_are_routed(prefix_routed: Service) -> None:
    """A prefix router has nothing to go by in a prompt of token ids."""
    assert prefix_routed.post("/v1/completions", prompt=[5, 6, 7], max_tokens=4).status_code == 200
