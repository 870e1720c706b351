"""LoRA adapters over HTTP: named at start-up, added and removed while serving."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from checkpoints import CheckpointFactory, CheckpointSpec
from lora_adapters import SPECS, merged, write_adapter
from openai import NotFoundError
from oracle_model import OracleModel
from serving import EDLM_OPTIONS, MAX_MODEL_LEN, NAME, RandomServer, serve

PROMPT = list(range(20, 50))
FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "8"),
    *("--additional-config", json.dumps({"edlm": EDLM_OPTIONS})),
    *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"),
)


@dataclass(frozen=True)
class AdapterServer:
    """A server that knows the adapter `linear`; the folder holds every other one as well."""

    server: RandomServer
    folder: Path

    def ask(self, model: str) -> list[int]:
        answer = self.server.client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=30,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].token_ids

    def expected(self, model: str) -> list[int]:
        oracle = self.server.oracle
        if model != NAME:
            oracle = merged(oracle, SPECS[model])
        return replace(self.server, oracle=oracle).expected(PROMPT, 30, ignore_eos=True).token_ids

    def assert_exact(self, models: list[str]) -> None:
        """Ask all of `models` at once."""
        with ThreadPoolExecutor(len(models)) as pool:
            for model, answer in zip(models, pool.map(self.ask, models), strict=True):
                assert answer == self.expected(model), model

    def post(self, path: str, **body: str) -> httpx.Response:
        return httpx.post(f"{self.server.address}/v1/{path}", json=body, timeout=60)

    def names(self) -> set[str]:
        return {model.id for model in self.server.client.models.list()}


@pytest.fixture(scope="module")
def adapters(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterServer]:
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    path, folder = checkpoint(spec), tmp_path_factory.mktemp("adapters")
    oracle = OracleModel.load(path)
    for name, adapter in SPECS.items():
        write_adapter(folder / name, adapter, oracle.weights)
    flags = (*FLAGS, "--lora-modules", f"linear={folder / 'linear'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
        with serve(path, NAME, folder / "log", *flags) as address:
            yield AdapterServer(RandomServer(address, NAME, path, spec, oracle), folder)


def test_an_adapter_named_at_start_up(adapters: AdapterServer) -> None:
    assert adapters.names() == {NAME, "linear"}
    assert adapters.expected("linear") != adapters.expected(NAME)
    adapters.assert_exact([NAME, "linear", NAME, "linear"])


def test_an_adapter_added_and_removed(adapters: AdapterServer) -> None:
    added = adapters.post(
        "load_lora_adapter", lora_name="ends", lora_path=f"{adapters.folder}/ends"
    )
    assert added.status_code == 200, added.text
    assert adapters.names() == {NAME, "linear", "ends"}
    adapters.assert_exact(["ends", NAME, "linear", "ends"])
    assert adapters.post("unload_lora_adapter", lora_name="ends").status_code == 200
    with pytest.raises(NotFoundError):
        adapters.ask("ends")
    adapters.assert_exact([NAME, "linear"])


def test_a_folder_without_an_adapter_is_refused(adapters: AdapterServer) -> None:
    answer = adapters.post("load_lora_adapter", lora_name="none", lora_path=f"{adapters.folder}/no")
    assert 400 <= answer.status_code < 500
    assert "none" in answer.text or "/no" in answer.text
    adapters.assert_exact([NAME])
