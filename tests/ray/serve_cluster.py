"""`examples.ray_serve` on a cluster of its own, and what it must answer."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import ray
from openai import OpenAI
from oracle import OracleResult, generate
from oracle_model import OracleModel
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState, ServeDeploySchema
from transformers import AutoTokenizer

from examples.convert.word_problems import problems
from examples.demo import free_port
from examples.ray_options import TINY_MATH
from examples.ray_serve import APP, Replica

T = TypeVar("T")
NAME = "tiny-math"
START_TRIES = 5
DEPLOYMENT = f"{Replica.__name__}:{NAME}"
LIMIT_SECONDS = 900
MAX_TOKENS = 64
QUESTIONS = [problem.question for problem in problems("heldout", 7, 4)]
# Ray takes 127.0.0.1 for the host's address in the network, which its processes do not listen on.
NODE = {"node_ip_address": "127.0.0.2", "object_store_memory": 100 * 2**20}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers are nice by default, and would starve beside anything else on two cores.
    "RAY_worker_niceness": "0",
    # Else the engine of a killed replica lives on.
    "RAY_process_group_cleanup_enabled": "1",
    "OMP_NUM_THREADS": "1",
}
# Running and waiting; what comes beyond is refused.
MOST_REQUESTS = 16
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_queued_reqs": MOST_REQUESTS,
    "enable_prompt_tokens_details": True,
}
OPTIONS = {
    "min_replicas": "1",
    "max_replicas": "2",
    "target_requests": "2",
    "upscale_seconds": "2",
    "downscale_seconds": "3600",
    # A busy machine is no sick replica.
    "health_seconds": "5",
    "health_timeout_seconds": "60",
    "kv_cache_gib": "0.1",
    "engine_args": json.dumps(ENGINE),
}
TOKENIZER = AutoTokenizer.from_pretrained(TINY_MATH)
ORACLE = OracleModel.load(TINY_MATH)


@cache
def expected(question: str, max_tokens: int = MAX_TOKENS, **options: Any) -> OracleResult:
    """What a decoder that recomputes everything answers to a chat of one question."""
    chat = [{"role": "user", "content": question}]
    prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    config = ORACLE.config
    return generate(
        ORACLE,
        prompt,
        block_length=config["block_size"],
        mask_token_id=config["mask_token_id"],
        prompt_attention=config["prompt_attention"],
        max_tokens=max_tokens,
        max_model_len=config["max_position_embeddings"],
        eos_token_id=config["eos_token_id"],
        **options,
    )


def text_of(answer: OracleResult) -> str:
    return TOKENIZER.decode(answer.token_ids, skip_special_tokens=True)


@dataclass(frozen=True)
class Service:
    """The running application and its cluster.

    Attributes:
        config: what Serve was given, if it was given a config.
    """

    cluster: Cluster
    process: subprocess.Popen[str]
    port: int
    log: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        url = f"{self.address}/v1"
        return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=LIMIT_SECONDS)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return httpx.post(self.address + path, json={"model": NAME} | body, timeout=LIMIT_SECONDS)

    def ask(self, question: str, **body: Any) -> httpx.Response:
        """Ask one question, greedily."""
        chat = [{"role": "user", "content": question}]
        return self.post(**{"messages": chat, "temperature": 0, "max_tokens": MAX_TOKENS} | body)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/v1/models", timeout=LIMIT_SECONDS).is_success
        except httpx.TransportError:
            return False

    def deploy(self, **changes: Any) -> None:
        """Give Serve its config again, with changes."""
        schema = ServeDeploySchema.model_validate(self.config | changes)
        _get_global_client().deploy_apps(schema)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, f"{what}: {serve.status()}"
            time.sleep(0.1)

    def replicas(self) -> list[psutil.Process]:
        """Processes of the model's replicas, on whichever node."""
        begin = f"ray::ServeReplica:{APP}:{DEPLOYMENT}"
        found = [child for node in self.cluster.list_all_nodes() for child in _workers(node)]
        return [process for process in found if _name(process).startswith(begin)]


def running_replicas() -> int:
    """Replicas of the model that Serve says are running."""
    deployment = serve.status().applications[APP].deployments[DEPLOYMENT]
    return deployment.replica_states.get(ReplicaState.RUNNING, 0)


def _workers(node: Any) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]
    try:
        return psutil.Process(raylet.process.pid).children()
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


def started(start: Callable[[], T]) -> T:
    """A cluster or a node; Ray gives it half a minute, which a busy machine may exceed."""
    for _ in range(START_TRIES - 1):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each. This process joins the cluster."""
    os.environ |= ENVIRONMENT
    head = NODE | {"num_cpus": 0, "include_dashboard": False}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        for _ in range(2):
            started(lambda: cluster.add_node(wait=False, **NODE, num_cpus=1))
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def configured(cluster: Cluster, folder: Path) -> Iterator[Service]:
    """As a RayService of KubeRay has it: an import path, and options as arguments."""
    application = {"name": APP, "import_path": "examples.ray_serve:app", "args": OPTIONS}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": (port := free_port())},
        "applications": [application],
    }
    (file := folder / "serve.yaml").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with _running(cluster, folder / "log", command) as process:
        service = Service(cluster, process, port, folder / "log", config)
        service.wait_for(lambda: service.answers() and running_replicas() == 1, "start")
        yield service


@contextmanager
def commanded(cluster: Cluster, folder: Path, *words: str, **changes: str) -> Iterator[Service]:
    """As a user at the command line has it."""
    command = [sys.executable, "-m", "examples.ray_serve", "--proxies", "HeadOnly", *words]
    command += ["--port", str(port := free_port())]
    for name, value in (OPTIONS | changes).items():
        command += [f"--{name.replace('_', '-')}", value]
    with _running(cluster, log := folder / "log", command) as process:
        service = Service(cluster, process, port, log)
        service.wait_for(lambda: "Ready: " in log.read_text(), "start")
        yield service


@contextmanager
def _running(cluster: Cluster, log: Path, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that serves on a cluster."""
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, text=True, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()
