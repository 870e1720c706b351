"""The OpenAI API on Ray Serve: what clients see while replicas come, die and drain.

The tests share one cluster and run in order: each begins with what the one before left.
"""

import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import httpx
import psutil
import pytest
from openai import APIError, BadRequestError
from ray import serve
from ray.cluster_utils import Cluster
from serve_cluster import (
    LIMIT_SECONDS,
    MOST_REQUESTS,
    NAME,
    NODE,
    QUESTIONS,
    TOKENIZER,
    Service,
    commanded,
    configured,
    expected,
    running_replicas,
    small_cluster,
    started,
    text_of,
)
from serve_load import load, streamed, unstreamed

from examples.ray_serve import listen

# More than the two requests a replica that the application aims at.
CLIENTS = 6
ENGINE_END_SECONDS = 120
# What a request that fails says: Serve's error, or the end of its connection. A stream that Ray's
# proxy cuts off has no finish reason.
FAILURES = {"500", "502", "503", "no connection", "error in stream", "cut off"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with small_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def served(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with configured(cluster, tmp_path_factory.mktemp("configured")) as service:
        yield service


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


@pytest.mark.parametrize("stream", [False, True])
def test_more_requests_than_a_replica_may_have(served: Service, stream: bool) -> None:
    """Each of a request's answers counts."""
    many = {"n": MOST_REQUESTS + 1, "temperature": 1, "stream": stream}
    refused = served.ask(QUESTIONS[0], **many)
    assert refused.status_code == 500
    assert "cannot accept new requests" in refused.text


def test_tokenize(served: Service) -> None:
    tokens = served.post("/tokenize", prompt=QUESTIONS[0]).json()["tokens"]
    assert tokens == TOKENIZER(QUESTIONS[0])["input_ids"]
    assert served.post("/detokenize", tokens=tokens).json()["prompt"] == QUESTIONS[0]


def test_serve_that_listens_elsewhere_is_refused(served: Service) -> None:
    """Serve would go on as it is, and an address that it was not told of would be a lie."""
    host, port = "127.0.0.1", served.port
    listen(host, port, "HeadOnly")
    with pytest.raises(ValueError, match=rf"port is {port} of .* got {port + 1}"):
        listen(host, port + 1, "HeadOnly")
    with pytest.raises(ValueError, match=r"host is '127.0.0.1' of .* got '0.0.0.0'"):
        listen("0.0.0.0", port, "HeadOnly")
    with pytest.raises(ValueError, match=r"proxies is 'HeadOnly' of .* got 'EveryNode'"):
        listen(host, port, "EveryNode")


def test_health(served: Service) -> None:
    """Of the proxy, for load balancers and Kubernetes."""
    assert httpx.get(f"{served.address}/-/healthz").text == "success"
    assert [model.id for model in served.client.models.list()] == [NAME]


def test_replicas_follow_the_load(served: Service) -> None:
    assert running_replicas() == 1
    with load(served, CLIENTS) as clients:
        served.wait_for(lambda: running_replicas() == 2, "a second replica")
        clients.wait_for_answers()
    assert set(clients.ended) == {"right"}, clients.failures
    assert len(served.replicas()) == 2


def test_a_removed_replica_finishes_its_requests(served: Service) -> None:
    """Of two replicas under load, streams too, one goes; half of what the application may have."""
    with load(served, CLIENTS) as clients:
        clients.wait_for_answers()
        served.deploy(target_capacity=50)
        served.wait_for(lambda: len(served.replicas()) == 1, "the replica's end")
        clients.wait_for_answers()
    assert set(clients.ended) == {"right"}, clients.failures
    served.deploy()


def engines(served: Service) -> set[psutil.Process]:
    """What runs below the replicas."""
    return {child for replica in served.replicas() for child in replica.children(recursive=True)}


def wait_for_another(served: Service, victim: psutil.Process) -> None:
    """Wait until a replica is replaced, and the new one runs."""
    served.wait_for(lambda: victim not in served.replicas(), "the replica's end")
    served.wait_for(lambda: len(served.replicas()) == 2, "another replica")
    served.wait_for(lambda: running_replicas() == 2, "another replica")


def test_killed_replica(served: Service) -> None:
    """SIGKILL under load: its requests fail clearly, or are answered when retried; it is replaced.

    There are more patient clients than others, so that it has a request of theirs.
    """
    with load(served, CLIENTS // 2) as plain, load(served, CLIENTS, 5) as patient:
        served.wait_for(lambda: running_replicas() == 2, "a second replica")
        plain.wait_for_answers()
        victim = served.replicas()[0]
        engine = victim.children(recursive=True)
        assert engine, "an engine runs beside its replica"
        victim.kill()
        wait_for_another(served, victim)
        plain.wait_for_answers()
    for clients in (plain, patient):
        assert set(clients.ended) <= {"right"} | FAILURES, clients.failures
    assert patient.retried, "what it was at work on was answered by the other"
    alive = psutil.wait_procs(engine, timeout=ENGINE_END_SECONDS)[1]
    assert not alive, "the engine of a killed replica goes with it"


def test_dead_engine_fails_the_health_check(served: Service) -> None:
    """A replica whose engine died answers with errors until it is replaced."""
    with load(served, CLIENTS // 2, 5) as clients:
        clients.wait_for_answers()
        victim = served.replicas()[0]
        for process in victim.children(recursive=True):
            process.kill()
        wait_for_another(served, victim)
        clients.wait_for_answers()
    assert set(clients.ended) <= {"right"} | FAILURES, clients.failures


def test_killed_raylet(served: Service) -> None:
    """A node goes with its replica; the other one answers on."""
    with load(served, CLIENTS // 2) as clients:
        clients.wait_for_answers()
        before = engines(served)
        node = next(iter(served.cluster.worker_nodes))
        served.cluster.remove_node(node, allow_graceful=False)
        served.wait_for(lambda: len(served.replicas()) == 1, "the replica's end")
        clients.wait_for_answers()
    assert set(clients.ended) <= {"right"} | FAILURES, clients.failures
    gone = before - engines(served)
    assert gone, "a node's replica goes with it"
    assert not psutil.wait_procs(gone, timeout=ENGINE_END_SECONDS)[1], "and its engine"


@pytest.fixture(scope="module")
def prefix_routed(
    served: Service, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """As a user at the command line has it, where the other was; the router has its own process."""
    serve.shutdown()
    # In place of the node that was killed.
    started(lambda: cluster.add_node(wait=False, **NODE, num_cpus=2))
    folder = tmp_path_factory.mktemp("commanded")
    with commanded(cluster, folder, "--prefix-routing", min_replicas="2") as service:
        yield service


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


def test_sigterm_drains(prefix_routed: Service) -> None:
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
    streams = [
        prefix_routed.client.chat.completions.create(**request, stream=True) for _ in range(4)
    ]
    begun = ["".join(c.choices[0].delta.content or "" for c in islice(s, 2)) for s in streams]
    prefix_routed.process.send_signal(signal.SIGTERM)
    ended = ["".join(c.choices[0].delta.content or "" for c in stream) for stream in streams]
    texts = [first + rest for first, rest in zip(begun, ended, strict=True)]
    assert texts == [text_of(wanted)] * len(streams)
    assert prefix_routed.process.wait(LIMIT_SECONDS) == 0, prefix_routed.log.read_text()[-5000:]
    with pytest.raises(httpx.TransportError):
        prefix_routed.ask(QUESTIONS[0])
    assert not prefix_routed.replicas()
