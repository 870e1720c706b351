"""Serve tiny-math with `vllm serve`, ask it questions over the OpenAI API, stop the server.

Usage: python examples/demo.py [--model DIR] [--port N]
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

TINY_MATH = Path(__file__).parent / "checkpoints" / "tiny-math"
NAME = "tiny-math"
START_SECONDS = 600
LOG = Path("runs") / "demo-server.log"
QUESTIONS = (
    "Tom has 12 apples. He buys 7 more apples. How many apples does he have now?",
    "Mia has 31 books. She gives away 9 books. How many books does she have now?",
    "Ben has 4 boxes with 6 pens in each box. How many pens does he have?",
)


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
    # vLLM would take half of the machine's memory for the KV cache of so small a model.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    LOG.parent.mkdir(exist_ok=True)
    with (
        LOG.open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            wait_until_healthy(server, address := f"http://127.0.0.1:{port}")
            yield address
        finally:
            server.terminate()


def wait_until_healthy(server: subprocess.Popen[bytes], address: str) -> None:
    """Return when /health answers.

    Raises:
        RuntimeError: the server ended or did not answer in `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; see {LOG}")
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s; see {LOG}")


def ask(client: OpenAI, question: str) -> None:
    """Print the whole answer, then its tokens per forward."""
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": question}], max_tokens=128
    )
    print(f"Q: {question}\nA: {answer.choices[0].message.content}")
    assert answer.usage is not None
    report(answer.usage.completion_tokens, answer.model_extra)


def ask_streamed(client: OpenAI, question: str) -> None:
    """Print the answer as it comes, a delta for each run of known tokens."""
    print(f"Q: {question}\nA: ", end="")
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=128,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="|", flush=True)
        elif chunk.usage is not None:
            print()
            report(chunk.usage.completion_tokens, chunk.model_extra)


def report(num_tokens: int, extra: dict[str, object] | None) -> None:
    """Tokens per forward from the metrics that vLLM sends with each answer."""
    metrics = (extra or {}).get("metrics")
    assert isinstance(metrics, dict), "the server sent no metrics"
    forwards = metrics["speculative_decoding"]["num_spec_steps"]
    per_forward = num_tokens / forwards
    print(f"   {num_tokens} tokens, {forwards} forwards: {per_forward:.2f} tokens per forward\n")


def main() -> None:
    """Serve, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    print(f"Starting vllm serve {args.model} (log: {LOG}) ...", flush=True)
    with served(args.model, args.port or free_port()) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        for question in QUESTIONS[:-1]:
            ask(client, question)
        ask_streamed(client, QUESTIONS[-1])
    print("The server has stopped.")


if __name__ == "__main__":
    main()
