"""`vllm serve` processes over a random checkpoint and over tiny-math, and clients of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from checkpoints import EOS_ID, MASK_ID, VOCABULARY, CheckpointSpec, tokenizer
from openai import AsyncOpenAI, OpenAI
from oracle import OracleResult, generate
from oracle_model import OracleModel
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.demo import TINY_MATH, free_port, wait_until_healthy

MAX_MODEL_LEN = 250
STOP_SECONDS = 120
NAME = "random"
TINY_NAME = "tiny-math"
EDLM_OPTIONS = {"prompt_attention": "block_causal", "threshold": 0.7}
# Beside the interpreter: the commands a user has after `pip install`.
BIN = Path(sys.executable).parent
REASONING_TAGS = ["<think>", "</think>"]
TOOL_TAGS = ["<tool_call>", "</tool_call>"]
# Chats are answers without reasoning unless a request asks for it.
PARSERS = (
    *("--enable-auto-tool-choice", "--reasoning-parser", "qwen3"),
    *("--default-chat-template-kwargs", '{"enable_thinking": false}'),
)
# JSON without needless spaces, of which a small model never tires.
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
RANDOM_FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "8"),
    *("--additional-config", json.dumps({"edlm": EDLM_OPTIONS})),
    *(*PARSERS, "--tool-call-parser", "hermes"),
    # A grammar can make the model say any text, reasoning included.
    *("--structured-outputs-config", json.dumps(GRAMMARS | {"enable_in_reasoning": True})),
)
TINY_FLAGS = (
    *("--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "16", "--enforce-eager"),
    *(*PARSERS, "--tool-call-parser", "qwen3_coder"),
    *("--structured-outputs-config", json.dumps(GRAMMARS)),
)


def post(client: httpx.Client, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    """Post bytes, or JSON as Python writes it, NaN included, which clients refuse to send."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


@dataclass(frozen=True)
class Server:
    """A running server, the name of its model and the folder of its tokenizer."""

    address: str
    name: str
    tokenizer_path: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        with httpx.Client(base_url=self.address, timeout=120) as client:
            return post(client, path, {"model": self.name} | body)

    def counter(self, name: str) -> float:
        """A counter of /metrics, by its name there."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@dataclass(frozen=True)
class RandomServer(Server):
    """A served random checkpoint beside its oracle; its options are `EDLM_OPTIONS`."""

    spec: CheckpointSpec
    oracle: OracleModel

    def expected(self, prompt_ids: list[int], max_tokens: int, **options: Any) -> OracleResult:
        return generate(
            self.oracle,
            prompt_ids,
            block_length=self.spec.block_length,
            mask_token_id=MASK_ID,
            prompt_attention=EDLM_OPTIONS["prompt_attention"],
            max_tokens=max_tokens,
            max_model_len=MAX_MODEL_LEN,
            eos_token_id=EOS_ID,
            **({"threshold": EDLM_OPTIONS["threshold"]} | options),
        )


def random_tokenizer() -> PreTrainedTokenizerFast:
    """The random checkpoint's tokenizer with two of its rare letters replaced by reasoning tags."""
    fast = tokenizer()
    content = json.loads(fast.backend_tokenizer.to_str())
    ids = content["model"]["vocab"]
    for letter, tag in zip(VOCABULARY[-3:-1], REASONING_TAGS, strict=True):
        ids[tag] = ids.pop(letter)
    fast._tokenizer = Tokenizer.from_str(json.dumps(content))
    fast.add_tokens(REASONING_TAGS)
    return fast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of tiny-math with reasoning and tool tags in spare rows of its vocabulary."""
    fast = AutoTokenizer.from_pretrained(TINY_MATH)
    fast.add_tokens(REASONING_TAGS + TOOL_TAGS)
    return fast


@contextmanager
def serve(path: Path, name: str, log: Path, *flags: str) -> Iterator[str]:
    """Run `vllm serve` until the block ends; yields its address."""
    with server_process(path, name, log, *flags) as (_, address):
        yield address


@contextmanager
def server_process(
    path: Path, name: str, log: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `serve`; yields the process too, which may end before the block does."""
    port = free_port()
    command = [str(BIN / "vllm"), "serve", str(path), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment()) as server,
    ):
        try:
            wait_until_healthy(server, address := f"http://127.0.0.1:{port}", log)
            yield server, address
        finally:
            stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server; one that is still starting may not hear of it, and its processes are killed."""
    family = [] if server.poll() is not None else psutil.Process(server.pid).children(True)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def environment() -> dict[str, str]:
    """One thread: two processes with spinning threads on two cores crawl."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run_command(*command: str, cwd: Path, **variables: str) -> str:
    """Standard output of an installed command that must succeed."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
