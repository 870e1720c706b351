"""What clients see when something fails: nothing that an answer promised is lost unsaid."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx
import psutil
import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from openai import APIConnectionError, APIError, InternalServerError
from oracle_model import OracleModel
from serving import NAME, RANDOM_FLAGS, RandomServer, random_tokenizer, server_process

TEXT = "Ann has 12 apples and eats 5. Ben has 7 pears and finds 30 more."
IDS = random_tokenizer().encode(TEXT)
# A forward a token: seconds of work on an idle machine, so that faults come in its middle.
LONG = 180
SLOW = {"diffusion_threshold": 1.0}
FINISHED = "vllm:request_success_total"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PATIENCE_SECONDS = 300
# As many as the crowded server holds.
AT_ONCE = 8


@dataclass
class Stream:
    """A long greedy stream, and what came of it."""

    server: RandomServer
    prompt: list[int]
    leave: bool = False
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: APIError | None = None
    begun: Event = field(default_factory=Event)

    def run(self) -> "Stream":
        """Read it to its end, to an error, or to the event at which its client leaves."""
        try:
            self._read()
        except APIError as error:
            self.error = error
        finally:
            self.begun.set()
        return self

    def _read(self) -> None:
        with self.server.client.completions.create(**body(self.prompt), stream=True) as events:
            for event in events:
                self.token_ids += event.choices[0].token_ids
                self.finish_reason = event.choices[0].finish_reason
                self.begun.set()
                if self.leave and len(self.token_ids) > 2:
                    return


def body(prompt: list[int]) -> dict[str, object]:
    more = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": SLOW}
    return {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": LONG,
        "temperature": 0,
        "extra_body": more,
    }


def expected(server: RandomServer, prompt: list[int]) -> list[int]:
    """The whole answer, alone."""
    return server.expected(prompt, LONG, threshold=1.0, ignore_eos=True).token_ids


def streams(server: RandomServer, count: int) -> list[Stream]:
    """Of as many different prompts."""
    return [Stream(server, IDS[i:]) for i in range(count)]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(0.02)


@contextmanager
def running(asked: list[Stream]) -> Iterator[None]:
    """Read streams in threads of their own; when the block begins, each has sent something."""
    with ThreadPoolExecutor(len(asked)) as pool:
        for stream in asked:
            pool.submit(stream.run)
        for stream in asked:
            assert stream.begun.wait(PATIENCE_SECONDS)
        yield


def assert_whole(stream: Stream) -> None:
    assert stream.error is None
    assert stream.finish_reason == "length"
    assert stream.token_ids == expected(stream.server, stream.prompt)


def in_flight(server: RandomServer) -> float:
    """Requests that have arrived at the engine and have not ended."""
    return server.counter(RUNNING) + server.counter(WAITING)


def test_clients_that_leave_give_their_memory_back(server: RandomServer) -> None:
    """What they asked for is not computed to its end; those who stay never notice."""
    before = server.counter(FINISHED)
    *leaving, first, second = streams(server, 6)
    for stream in leaving:
        stream.leave = True
    with running([*leaving, first, second]):
        pass
    for stream in (first, second):
        assert_whole(stream)
    for stream in leaving:
        assert stream.finish_reason is None
        assert stream.token_ids == expected(server, stream.prompt)[: len(stream.token_ids)]
    wait_until(lambda: in_flight(server) == 0, "no request is left")
    wait_until(lambda: server.counter("vllm:kv_cache_usage_perc") == 0, "no KV page is in use")
    assert server.counter(FINISHED) == before + 2


@dataclass(frozen=True)
class Own:
    """A server of a test's own, and its process."""

    server: RandomServer
    process: subprocess.Popen[bytes]


@contextmanager
def own(checkpoint: CheckpointFactory, folder: Path, *flags: str) -> Iterator[Own]:
    """The checkpoint of the shared server, served with more flags."""
    torch.set_num_threads(1)
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    path = checkpoint(spec)
    random_tokenizer().save_pretrained(tokenizer := folder / "tokenizer")
    flags = (*RANDOM_FLAGS, "--tokenizer", str(tokenizer), *flags)
    with server_process(path, NAME, folder / "log", *flags) as (running_process, address):
        oracle = OracleModel.load(path)
        yield Own(RandomServer(address, NAME, tokenizer, spec, oracle), running_process)


@pytest.fixture(scope="module")
def crowded(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RandomServer]:
    """KV pages for one request of full length and a little more; no more than eight requests."""
    flags = ("--block-size", "32", "--num-gpu-blocks-override", "12")
    limit = ("--max-num-queued-reqs", str(AT_ONCE))
    with own(checkpoint, tmp_path_factory.mktemp("crowded"), *flags, *limit) as started:
        yield started.server


def test_out_of_kv_pages(crowded: RandomServer) -> None:
    """Requests are preempted and resumed, in mid-block too; each answer is whole."""
    name = "vllm:num_preemptions_total"
    before = crowded.counter(name)
    asked = streams(crowded, 6)
    with running(asked):
        pass
    for stream in asked:
        assert_whole(stream)
    wait_until(lambda: crowded.counter(name) > before, "some request was preempted")


def test_beyond_the_limit_of_requests(crowded: RandomServer) -> None:
    """One more is refused at once with a 503 that says why; those within the limit are answered."""
    asked = streams(crowded, AT_ONCE)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(stream.run) for stream in asked]
        wait_until(lambda: in_flight(crowded) == AT_ONCE, "all requests have arrived")
        refused = crowded.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert not any(future.done() for future in futures)
    assert refused.status_code == 503
    assert "busy" in refused.json()["error"]["message"]
    for stream in asked:
        assert_whole(stream)


def alive(process: psutil.Process) -> bool:
    """Whether a process is more than an entry that nobody has asked about."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_killed_in_mid_block(checkpoint: CheckpointFactory, tmp_path: Path, victim: str) -> None:
    """No answer ends as if it were whole, what came of it is right, and the server exits."""
    with own(checkpoint, tmp_path) as started:
        family = psutil.Process(started.process.pid).children(recursive=True)
        asked = streams(started.server, 3)
        with running(asked), ThreadPoolExecutor() as pool:
            whole = pool.submit(started.server.client.completions.create, **body(IDS))
            wait_until(lambda: in_flight(started.server) == 4, "all requests have arrived")
            next(p for p in family if victim in " ".join(p.cmdline())).kill()
            with pytest.raises((InternalServerError, APIConnectionError)):
                whole.result()
        for stream in asked:
            assert stream.error is not None
            assert stream.finish_reason is None
            answer = expected(started.server, stream.prompt)
            assert stream.token_ids == answer[: len(stream.token_ids)]
            assert 0 < len(stream.token_ids) < len(answer)
        # With status 0, as vLLM has it: whoever restarts servers must not go by that.
        started.process.wait(PATIENCE_SECONDS)
        wait_until(lambda: not any(map(alive, family)), "no process is left")


def test_sigterm_drains(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """With --shutdown-timeout, requests that have arrived are answered; later ones are not."""
    with own(checkpoint, tmp_path, "--shutdown-timeout", str(PATIENCE_SECONDS)) as started:
        asked = streams(started.server, 4)
        with running(asked), ThreadPoolExecutor() as pool:
            whole = pool.submit(started.server.client.completions.create, **body(IDS))
            wait_until(lambda: in_flight(started.server) == 5, "all requests have arrived")
            started.process.send_signal(signal.SIGTERM)
        for stream in asked:
            assert_whole(stream)
        (choice,) = whole.result().choices
        assert choice.token_ids == expected(started.server, IDS)
        assert started.process.wait(PATIENCE_SECONDS) == 0
        with pytest.raises(httpx.ConnectError):
            started.server.post("/v1/completions", {"prompt": "a"})
