"""Serve tiny-math with `vllm serve`, ask it questions over the OpenAI API, stop the server.

The questions are held out: none like them, numbers and all, was in the training data.

Usage: python -m examples.demo [--model DIR] [--port N]
"""

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from examples.convert.word_problems import Problem, grade, problems

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"
NAME = "tiny-math"
START_SECONDS = 600
LOG = Path("runs") / "demo-server.log"
NUM_QUESTIONS = 4
HELDOUT_SEED = 7


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(model: str, port: int) -> Iterator[str]:
    """Run `vllm serve` until the block ends; yields the address once it answers."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    # Without a size vLLM takes most of the memory of a CPU machine for the KV cache.
    command += ["--kv-cache-memory-bytes", str(2**30)]
    LOG.parent.mkdir(exist_ok=True)
    with (
        LOG.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            wait_until_healthy(server, address := f"http://127.0.0.1:{port}")
            yield address
        finally:
            server.terminate()


def wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path = LOG) -> None:
    """Return when /health answers; `log` is where the server writes.

    Raises:
        RuntimeError: the server ended or did not answer in `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; see {log}")
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s; see {log}")


def ask(client: OpenAI, problem: Problem) -> None:
    """Print the whole answer, then its tokens per forward."""
    print(f"Q: {problem.question}")
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": problem.question}],
        max_tokens=128,
        temperature=0,
    )
    text = answer.choices[0].message.content or ""
    assert answer.usage is not None
    print(f"A: {text}")
    report(text, problem, answer.usage.completion_tokens, answer.model_extra)


def ask_streamed(client: OpenAI, problem: Problem) -> None:
    """Print the answer as it comes; a bar ends each delta, a run of tokens revealed together."""
    print(f"Q: {problem.question}\nA: ", end="")
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": problem.question}],
        max_tokens=128,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    for chunk in stream:
        if chunk.choices and (delta := chunk.choices[0].delta.content):
            text += delta
            print(delta, end="|", flush=True)
        if chunk.usage is not None:
            print()
            report(text, problem, chunk.usage.completion_tokens, chunk.model_extra)


def report(answer: str, problem: Problem, num_tokens: int, extra: dict[str, object] | None) -> None:
    """Grade the answer; tokens per forward come from the metrics vLLM sends with each answer."""
    metrics = (extra or {}).get("metrics")
    assert isinstance(metrics, dict), "the server sent no metrics"
    forwards = metrics["speculative_decoding"]["num_spec_steps"]
    verdict = "right" if grade(answer, problem.result) else f"wrong, it is {problem.result}"
    print(f"   {verdict}; {num_tokens} tokens in {forwards} forwards:", end=" ")
    print(f"{num_tokens / forwards:.2f} tokens per forward\n")


def main() -> None:
    """Serve, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    print(f"Starting vllm serve {args.model} (log: {LOG}) ...", flush=True)
    with served(args.model, args.port or free_port()) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        *asked, streamed = problems("heldout", HELDOUT_SEED, NUM_QUESTIONS)
        for problem in asked:
            ask(client, problem)
        ask_streamed(client, streamed)
    print("The server has stopped.")


if __name__ == "__main__":
    main()
