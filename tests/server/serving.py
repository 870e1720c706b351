"""One `vllm serve` process over a random checkpoint, and its answers beside the oracle's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from checkpoints import EOS_ID, MASK_ID, CheckpointSpec
from openai import OpenAI
from oracle import OracleResult, generate
from oracle_model import OracleModel

from examples.demo import free_port, wait_until_healthy

MAX_MODEL_LEN = 250
NAME = "random"
EDLM_OPTIONS = {"prompt_attention": "block_causal", "threshold": 0.7}


@dataclass(frozen=True)
class Server:
    """A served checkpoint; its options are `EDLM_OPTIONS`."""

    address: str
    spec: CheckpointSpec
    oracle: OracleModel

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Post JSON as Python writes it, NaN included, which client libraries refuse to send."""
        headers = {"Content-Type": "application/json"}
        content = json.dumps({"model": NAME} | body)
        return httpx.post(self.address + path, content=content, headers=headers, timeout=120)

    def counter(self, name: str) -> float:
        """A counter of /metrics, by its name there."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

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


@contextmanager
def serve(path: Path, spec: CheckpointSpec, log: Path) -> Iterator[Server]:
    """Run the server until the block ends."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(path)),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "8"),
        *("--additional-config", json.dumps({"edlm": EDLM_OPTIONS})),
    ]
    # One thread: two processes with spinning threads on two cores crawl.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            wait_until_healthy(process, address := f"http://127.0.0.1:{port}", log)
            yield Server(address, spec, OracleModel.load(path))
        finally:
            process.terminate()
