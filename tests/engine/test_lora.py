"""LoRA adapters per request: the tokens are those of a model with the adapter merged in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from harness import KV_PAGE, Ask, Engine, Served, prompt
from lora_adapters import SPECS, merged, write_adapter
from oracle import OracleResult
from oracle_model import OracleModel
from safetensors.torch import save_file
from vllm import RequestOutput
from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class Adapters:
    """An engine with LoRA, its adapters on disk, and an oracle for each."""

    engine: Engine
    requests: dict[str, LoRARequest]
    oracles: dict[str, OracleModel]

    def expected(self, ask: Ask, adapter: str | None) -> OracleResult:
        if adapter is None:
            return self.engine.expected(ask)
        return replace(self.engine, oracle=self.oracles[adapter]).expected(ask)

    def generate(self, asks: Sequence[Ask], adapters: Sequence[str | None]) -> list[RequestOutput]:
        """Serve all of `asks` at once, each with its adapter, None for the model itself."""
        self.engine.steps.clear()
        return self.engine.llm.generate(
            [{"prompt_token_ids": list(ask.prompt)} for ask in asks],
            [ask.sampling_params() for ask in asks],
            lora_request=[self.requests.get(adapter) for adapter in adapters],
            use_tqdm=False,
        )

    def assert_exact(
        self, asks: Sequence[Ask], adapters: Sequence[str | None]
    ) -> list[RequestOutput]:
        outputs = self.generate(asks, adapters)
        for ask, adapter, output in zip(asks, adapters, outputs, strict=True):
            expected = self.expected(ask, adapter).token_ids
            assert list(output.outputs[0].token_ids) == expected, (adapter, ask)
        return outputs


@pytest.fixture(scope="module")
def adapters(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Three adapters, two of them at once; prompts are chunked and prefixes shared."""
    spec = CheckpointSpec(layout="encoder", prompt_attention="block_causal", seed=0)
    engine = Engine.start(
        checkpoint(spec),
        Served(spec.block_length, "block_causal"),
        enforce_eager=True,
        max_num_batched_tokens=128,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=3,
        max_lora_rank=8,
    )
    folder, requests = tmp_path_factory.mktemp("adapters"), {}
    for i, (name, adapter) in enumerate(SPECS.items(), start=1):
        write_adapter(folder / name, adapter, engine.oracle.weights)
        requests[name] = LoRARequest(name, i, str(folder / name))
    oracles = {name: merged(engine.oracle, adapter) for name, adapter in SPECS.items()}
    return Adapters(engine, requests, oracles)


def test_adapters_change_the_answer(adapters: Adapters) -> None:
    """Else every test below would pass without any adapter."""
    ask = Ask(prompt(27, seed=80), max_tokens=40)
    answers = [adapters.expected(ask, name).token_ids for name in (None, *SPECS)]
    assert len({tuple(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize("adapter", [None, *SPECS])
def test_alone(adapters: Adapters, adapter: str | None) -> None:
    adapters.assert_exact([Ask(prompt(27, seed=80), max_tokens=40)], [adapter])


def test_adapters_and_none_in_one_batch(adapters: Adapters) -> None:
    """Both slots are taken, and every second request has no adapter."""
    names = ["linear", None, "ends", None, "ends", None, "linear", None]
    asks = [
        Ask(prompt(9 + 11 * i, seed=81 + i), max_tokens=48 + i, threshold=(0.6, 1.0, 0.8)[i % 3])
        for i in range(len(names))
    ]
    adapters.assert_exact(asks, names)
    at_once = max(len(step.num_drafts) for step in adapters.engine.forwards)
    assert at_once >= len(names) - 1  # So both adapters and none are among them.


def test_more_adapters_than_slots(adapters: Adapters) -> None:
    names = ["linear", "ends", "mlp", None, "mlp", "linear"]
    asks = [Ask(prompt(20 + i, seed=90 + i), max_tokens=20) for i in range(len(names))]
    adapters.assert_exact(asks, names)


def test_cached_prefixes_are_kept_apart(adapters: Adapters) -> None:
    """A request reuses what its own adapter computed, and nothing else."""
    ask = Ask(prompt(3 * KV_PAGE + 5, seed=100))
    for name in (None, "linear", "ends"):
        (first,) = adapters.assert_exact([ask], [name])
        (second,) = adapters.assert_exact([ask], [name])
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == 3 * KV_PAGE


def test_an_adapter_is_replaced_while_serving(adapters: Adapters, tmp_path: Path) -> None:
    """Removed, and another of the same id added: the next request gets the other one."""
    llm, ask = adapters.engine.llm.llm_engine, Ask(prompt(30, seed=101), max_tokens=30)
    adapters.assert_exact([ask], ["mlp"])
    number = adapters.requests["mlp"].lora_int_id
    other = replace(SPECS["mlp"], seed=4)
    write_adapter(tmp_path / "other", other, adapters.engine.oracle.weights)
    assert llm.remove_lora(number)
    assert number not in llm.list_loras()
    request = LoRARequest("other", number, str(tmp_path / "other"))
    assert llm.add_lora(request)
    changed = replace(
        adapters,
        requests=adapters.requests | {"other": request},
        oracles=adapters.oracles | {"other": merged(adapters.engine.oracle, other)},
    )
    assert changed.expected(ask, "other").token_ids != changed.expected(ask, "mlp").token_ids
    changed.assert_exact([ask, ask], ["other", None])
    assert llm.remove_lora(number)


def test_an_unknown_module_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    """The message names it; the engine goes on."""
    write_adapter(tmp_path / "bad", SPECS["mlp"], {"layers.0.down_proj.weight": torch.ones(2, 2)})
    tensors = {"base_model.model.model.layers.0.mlp.w2.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"w2"):
        adapters.engine.llm.llm_engine.add_lora(LoRARequest("bad", 9, str(tmp_path / "bad")))
    adapters.assert_exact([Ask(prompt(12, seed=102))], ["linear"])
